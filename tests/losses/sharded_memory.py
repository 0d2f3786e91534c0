"""Peak memory of a large vocabulary in two processes; started by test_sharded_memory.py."""

import torch
import torch.distributed as dist
from two_ranks import fork

import topd
from topd.memory import peak_mib

N, WIDTH, VOCAB, WORKSPACE = 1024, 64, 151_936, 64 << 20
CPU = torch.device("cpu")


def work(rank):
    """Return the peak of a call and its backward pass beyond the inputs, MiB, and the rows of the weight's gradient."""
    dist.init_process_group("gloo")
    half = VOCAB // 2
    shard = topd.VocabShard(dist.group.WORLD, rank * half, VOCAB)
    weight = (torch.randn(half, WIDTH) * 0.1).requires_grad_()
    hidden, teacher_hidden = torch.randn(N, WIDTH, requires_grad=True), torch.randn(N, WIDTH)
    student, teacher = topd.Head(weight, shard=shard), topd.Head(weight.detach() + 0.1, shard=shard)
    with peak_mib(CPU) as read:
        value = topd.linear_divergence(hidden, student, teacher_hidden, teacher, backend="eager", workspace_bytes=WORKSPACE)
        value.mean().backward()
        mib = read()
    return {"peak_mib": mib, "rows": weight.grad.shape[0]}


if __name__ == "__main__":
    fork(work)
