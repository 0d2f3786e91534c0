"""Peak memory of a large vocabulary in two processes; started by test_sharded_memory.py."""

import torch
import torch.distributed as dist
from two_ranks import fork

import topd
from topd.memory import peak_mib

N, WIDTH, VOCAB, WORKSPACE = 128, 32, 151_936, 16 << 20
HALF, CPU = VOCAB // 2, torch.device("cpu")


def divergence(weight, shard):
    """Return what compares so many rows of hidden states with a teacher."""
    student, teacher = topd.Head(weight, shard=shard), topd.Head(weight.detach() + 0.1, shard=shard)
    teacher_hidden = torch.randn(N, WIDTH)

    def call(hidden):
        states = hidden, student, teacher_hidden[: len(hidden)], teacher
        return topd.linear_divergence(*states, backend="eager", workspace_bytes=WORKSPACE)

    return call


def logprobs(weight, shard):
    """Return what takes three log-probabilities of so many rows."""
    student, ids = topd.Head(weight, shard=shard), torch.arange(0, 3 * N).view(N, 3) * (VOCAB // (3 * N))

    def call(hidden):
        return topd.linear_logprobs(hidden, student, ids[: len(hidden)], workspace_bytes=WORKSPACE)

    return call


def peak(weight, rows, call):
    """Return the peak of a call on so many rows and its backward pass beyond the inputs, MiB."""
    hidden = torch.randn(rows, WIDTH, requires_grad=True)

    def step(rows):
        """Take value and gradients of the first rows."""
        weight.grad = None
        call(hidden[:rows]).mean().backward()

    step(8)  # what libraries keep from their first call does not count
    with peak_mib(CPU) as read:
        step(rows)
        return read()


def work(rank):
    """Return the peaks with all rows on each rank and with rows of its own, and the rows of the weight's gradient."""
    dist.init_process_group("gloo")
    weight = (torch.randn(HALF, WIDTH) * 0.1).requires_grad_()
    peaks = {}
    for shared in (False, True):
        shard = topd.VocabShard(dist.group.WORLD, rank * HALF, VOCAB, sequence_parallel=shared)
        peaks[shared] = peak(weight, N // 2 if shared else N, divergence(weight, shard))
    peaks["logprobs"] = peak(weight, N, logprobs(weight, topd.VocabShard(dist.group.WORLD, rank * HALF, VOCAB)))
    return {"peaks_mib": peaks, "rows": weight.grad.shape[0]}


if __name__ == "__main__":
    fork(work)
