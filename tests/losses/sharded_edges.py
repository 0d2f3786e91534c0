"""Sharded heads at the edges, in two processes; started by test_sharded_edges.py. A function is named like its result."""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from compare import DIVERGENCES, Model, Problem, gradients, plain, random_problem
from shard_cases import counted_collectives, head_of, rows_of, shard_of, sides_of
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from two_ranks import fork_cases, message

import topd
from topd.ops.shared import hidden_sums
from topd.ops.shared.shard import Shard as OpShard

STARTS = (0, 23)
EVERYTHING = {"student": {"bias": True, "rank": 3, "softcap": 8.0}, "teacher": {"vocab": 53, "bias": True}, "mask": True}


def truth(problem: Problem, divergence: topd.Divergence) -> dict[str, Any]:
    """Return the value of each row and the gradients of their sum on whole heads."""
    outcome = plain(replace(problem, divergence=divergence), torch.ones(11))
    return {"value": outcome.value, "grads": outcome.grads}


def near_equal(rank):
    """Rows whose true KL is about 4e-9: one-hot hidden states, so that the products are the weights themselves."""
    weight = torch.randn(5003, 16)
    other, starts = weight + 9e-5 * torch.randn(5003, 16), (0, 2000)
    student, teacher = (shard_of(Model(torch.eye(16), part), starts, rank) for part in (weight, other))
    sides = (student.hidden, head_of(student, starts, rank, 5003), teacher.hidden, head_of(teacher, starts, rank, 5003))
    scores = topd.score_tokens(*sides)
    return {"forward": scores.forward_kl, "reverse": scores.reverse_kl, "weight": weight, "other": other}


def peaked(rank):
    """A token with 1 - p of about 1e-10, held by rank 1, and what the other rank holds."""
    weight = torch.zeros(64, 1)
    weight[50] = 27.0
    model = shard_of(Model(torch.ones(1, 1), weight), (0, 32), rank)
    sides = (model.hidden, head_of(model, (0, 32), rank, 64)) * 2
    return {"logprob": topd.score_tokens(*sides, tokens=torch.tensor([50])).student_logprob}


def absent_tokens(rank):
    """-inf logits, on one side and on both, and a rank that holds nothing else."""
    problem = random_problem({"student": {"bias": True}, "teacher": {"bias": True}})
    problem.teacher.bias[23:] = -torch.inf
    problem.student.bias[30:] = -torch.inf
    student, sides = sides_of(problem, STARTS, rank)
    value = topd.linear_divergence(*sides, divergence="forward_kl")
    grads = gradients(value, torch.ones_like(value), student)
    infinite = topd.linear_divergence(*sides).detach()
    return {"truth": truth(problem, topd.ForwardKL()), "value": value.detach(), "grads": grads, "reverse": infinite}


def no_rows(rank):
    grads = []
    for mask in (None, torch.zeros(11, dtype=torch.bool)):
        problem = random_problem({"student": {"bias": True, "rank": 2}}, n=11 if mask is not None else 0)
        student, sides = sides_of(problem, STARTS, rank)
        value, scores = topd.linear_divergence(*sides, mask=mask, return_scores=True)
        grads.append({"value": value.detach(), "kl": scores.forward_kl} | gradients(value, torch.ones_like(value), student))
    return {"grads": grads}


def second_backward(rank):
    problem = random_problem(EVERYTHING)
    student, sides = sides_of(problem, STARTS, rank)
    value, grads = topd.linear_divergence(*sides, mask=problem.mask, workspace_bytes=30_000), []
    for _ in range(2):
        value.backward(torch.linspace(-1, 2, 11).double(), retain_graph=True)
        grads.append(student.weight.grad.clone())
    return {"once": grads[0], "twice": grads[1]}


def gradcheck(rank):
    """Of what all ranks hold alike, hidden states and a: then all of them move the same entry."""
    problem = random_problem({"student": {"rank": 2, "bias": True}}, n=3)
    student, (hidden, head, *teacher) = sides_of(problem, STARTS, rank)

    def value(hidden, a):
        own = topd.Head(head.weight, head.bias, adapter=topd.LowRank(a, student.b, 0.5), shard=head.shard)
        return topd.linear_divergence(hidden, own, *teacher, divergence=topd.JSD(0.3))

    return {"passed": torch.autograd.gradcheck(value, (hidden, student.a))}


def collectives(rank):
    """Count what a call of three chunks says, forward and backward."""
    problem = random_problem({}, n=12)
    _, sides = sides_of(problem, STARTS, rank)
    with counted_collectives() as counts:
        value = topd.linear_divergence(*sides, workspace_bytes=4 * 20 * 23 * 8)
        forward = dict(counts)
        value.sum().backward(retain_graph=True)
        backward = {name: counts[name] - forward[name] for name in counts}
        value.backward(torch.linspace(1, 2, 12).double())
        redone = {name: counts[name] - forward[name] - backward[name] for name in counts}
    return {"forward": forward, "backward": backward, "redone": redone}


def bytes_of_a_row(rank):
    """The bytes of a row in each gather of a call of one chunk, by divergence, in float32 with all that may travel; and the
    collectives of its backward pass under a scalar, without a mask and with one."""
    sides = {"teacher": {"vocab": 53}, "student": {"bias": True, "rank": 2}}
    problem = random_problem(sides, n=16).to(torch.float32)
    masked = torch.arange(16) % 4 != 2
    results, original = {}, dist.all_gather
    for divergence in DIVERGENCES:
        _, sides = sides_of(problem, STARTS, rank)
        sent = []

        def gather(parts, mine, sent=sent, **options):
            sent.append(mine.numel() * mine.itemsize / 16)
            return original(parts, mine, **options)

        dist.all_gather = gather
        with counted_collectives() as forward:  # counts what the line above has put in the place of torch's
            options = {"tokens": problem.tokens, "hard_weight": 0.5, "return_scores": True}
            value, _ = topd.linear_divergence(*sides, divergence=divergence, **options)
        dist.all_gather = original
        with counted_collectives() as backward:
            (value.sum() / 7).backward()
        value = topd.linear_divergence(*sides, divergence=divergence, mask=masked)
        with counted_collectives() as with_mask:
            (value.sum() / 7).backward()
        results[str(divergence)] = {"sent": sent[2:], "forward": dict(forward), "backward": [dict(backward), dict(with_mask)]}
    return results


def deviating(rank):
    """Upstream gradients that deviate from a right hint in 0, 3 and 100 % of 34 rows, and a hint that is wrong."""
    hint, results = torch.linspace(0.5, 2, 34, dtype=torch.float64), {}
    upstreams = {
        "0 %": (4 * hint, hint),
        "3 %": (hint.index_fill(0, torch.tensor([20]), 0.1), hint),
        "100 %": (torch.linspace(-1, 2, 34).sin(), hint),
        "wrong": (hint, 1 / hint),
    }
    for name, (upstream, announced) in upstreams.items():
        torch.manual_seed(0)
        problem = random_problem(EVERYTHING | {"hard_weight": 0.3}, topd.JSD(0.3), n=34)
        problem.mask[20] = True
        problem.tokens[20] = 3
        student, sides = sides_of(problem, STARTS, rank)
        options = {"weights_hint": announced, "workspace_bytes": 60_000 + 9_000 * rank}
        value = topd.linear_divergence(*sides, **problem.options(), **options)
        with counted_collectives() as counts:
            grads = gradients(value, upstream, student)
        expected = plain(problem, upstream)
        true = {"value": expected.value, "grads": expected.grads}
        results[name] = {"value": value.detach(), "grads": grads, "truth": true, "gathers": counts["all_gather"]}
    return results


def two_runs(rank):
    """The same call twice, in float32, of each divergence: the bits of value, scores and gradients."""
    results = []
    for divergence in DIVERGENCES:
        problem, runs = random_problem(EVERYTHING, n=34).to(torch.float32), []
        for _ in range(2):
            student, sides = sides_of(problem, STARTS, rank)
            options = problem.options() | {"divergence": divergence, "workspace_bytes": 60_000}
            value, scores = topd.linear_divergence(*sides, **options, return_scores=True)
            grads = gradients(value, torch.linspace(-1, 2, 34), student)
            runs.append({"value": value.detach()} | grads | vars(scores))
        results.append(runs)
    return {"each": results}


def planted_faults(rank):
    """Gradients without the other shards' terms: the sum comes, and is not used; of hidden states, and of an adapter's `a`."""
    results, originals = {}, (hidden_sums.adding_up, OpShard.summed)
    for name in ("hidden", "a"):
        torch.manual_seed(0)
        problem = random_problem({"student": {"rank": 2}})
        if name == "hidden":
            hidden_sums.adding_up = lambda group, mine: originals[0](group, mine.clone())
        else:
            OpShard.summed = lambda shard, mine: (originals[1](shard, mine.clone()), mine)[1]
        student, sides = sides_of(problem, STARTS, rank)
        value = topd.linear_divergence(*sides)
        grads = gradients(value, torch.ones(()).expand(11), student)
        hidden_sums.adding_up, OpShard.summed = originals
        results[name] = {"truth": truth(problem, topd.ReverseKL()), "value": value.detach(), "grads": grads}
    return results


def dtensors(rank):
    mesh, problem = (
        init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor")),
        random_problem({"student": {"bias": True}}),
    )
    placements = [Replicate(), Shard(0)]

    def cut(tensor):
        return distribute_tensor(tensor, mesh, placements)

    weight, bias = (cut(tensor).requires_grad_() for tensor in (problem.student.weight, problem.student.bias))
    hidden, student = problem.student.hidden.clone().requires_grad_(), topd.Head(weight, bias)
    value = topd.linear_divergence(hidden, student, problem.teacher.hidden, topd.Head(cut(problem.teacher.weight)))
    value.sum().backward()
    assert isinstance(weight.grad, DTensor)
    grads = {"hidden": hidden.grad, "weight": weight.grad.full_tensor(), "bias": bias.grad.full_tensor()}
    columns = distribute_tensor(problem.student.weight, mesh, [Replicate(), Shard(1)])
    refusals = [message(lambda: topd.Head(columns)), message(lambda: topd.Head(problem.student.weight, bias))]
    place = {"start": student.shard.start, "refusals": refusals}
    return {"truth": truth(problem, topd.ReverseKL()), "value": value.detach(), "grads": grads} | place


def resharded(rank):
    """A teacher that is cut elsewhere: refused, then moved."""
    problem = random_problem(EVERYTHING)
    _, (hidden, own, teacher_hidden, _) = sides_of(problem, STARTS, rank)
    elsewhere = (0, 40)
    teacher = head_of(shard_of(problem.teacher, elsewhere, rank), elsewhere, rank, 53)
    refusal = message(lambda: topd.linear_divergence(hidden, own, teacher_hidden, teacher))
    teacher = teacher.resharded(like=own)
    value = topd.linear_divergence(hidden, own, teacher_hidden, teacher, mask=problem.mask)
    stop = (23, 53)[rank]
    for mine, every in ((teacher.weight, problem.teacher.weight), (teacher.bias, problem.teacher.bias)):
        assert torch.equal(mine, rows_of(every, STARTS[rank], stop))
    expected = truth(problem, topd.ReverseKL())
    return {"truth": expected, "value": value.detach(), "refusal": refusal, "start": teacher.shard.start}


def refusals(rank):
    """Calls that are wrong on one rank alone, or that do not go together: every rank gets an error, none waits."""
    problem = random_problem({})
    _, (hidden, student, teacher_hidden, teacher) = sides_of(problem, STARTS, rank)
    whole, n = topd.Head(problem.teacher.weight), 11
    twisted = hidden.detach() if rank == 0 else hidden.detach().flip(0) * 1.5
    some = torch.arange(n) < (5 if rank == 0 else 6)
    temperature, tokens = (0.0 if rank == 1 else 1.0), torch.full((n,), 41 if rank == 1 else 3)
    half = topd.Head(student.weight.detach()[:3], shard=topd.VocabShard(dist.group.WORLD, STARTS[rank], 41))

    def call(states=hidden, own=student, other=teacher, **options):
        return message(lambda: topd.linear_divergence(states, own, teacher_hidden[: states.shape[0]], other, **options))

    return {
        "temperature": call(temperature=temperature),
        "tokens": call(tokens=tokens),
        "rows": call(states=hidden.detach()[: n - rank]),
        "states": call(states=twisted),
        "mask": call(mask=some),
        "options": call(divergence="jsd" if rank == 0 else "reverse_kl"),
        "whole": call(other=whole),
        "gap": call(own=half),
        **{name: call(backend=name) for name in ("reference", "cpp", "triton")},
        "small": call(workspace_bytes=100),
        "flags": call(other=replace(teacher, shard=replace(teacher.shard, sequence_parallel=True))),
    }


if __name__ == "__main__":
    fork_cases(
        near_equal,
        peaked,
        absent_tokens,
        no_rows,
        second_backward,
        gradcheck,
        collectives,
        bytes_of_a_row,
        deviating,
        two_runs,
        planted_faults,
        dtensors,
        resharded,
        refusals,
    )
