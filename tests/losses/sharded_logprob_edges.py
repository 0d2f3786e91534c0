"""linear_logprobs and topk_logprobs on sharded heads at the edges, in two processes; started by test_sharded_logprob_edges.py.
A function is named like its result."""

from dataclasses import replace

import torch
from compare import Model, gradients, random_model
from logprob_cases import OPTIONS, by_topd, plain, random_problem
from shard_cases import counted_collectives, side_of
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from two_ranks import fork_cases, message

import topd
from topd.ops.shared import hidden_sums
from topd.ops.shared.shard import Shard as OpShard

STARTS, VOCAB = (0, 23), 41
EVERYTHING = {"bias": True, "rank": 3, "softcap": 8.0, "scale": 0.8}


def peaked(rank):
    """A token with 1 - p of about 1e-10, held by rank 1: alone, and beside one that rank 0 holds. Its gradient is the same."""
    weight = torch.zeros(64, 1)
    weight[50] = 27.0
    results = {}
    for name, ids in (("alone", [[50]]), ("two", [[3, 50]])):
        leaves, sides = side_of(Model(torch.ones(1, 1), weight), rank, (0, 32))
        value, entropy = topd.linear_logprobs(*sides, torch.tensor(ids), return_entropy=True)
        value[0, -1].backward()
        results[name] = {"value": value[0, -1:].detach(), "hidden": leaves.hidden.grad[0], "entropy": entropy.detach()}
    return results


def absent_tokens(rank):
    """-inf logits, also of a chosen token, and a rank that holds nothing else."""
    problem = random_problem({"bias": True, "rank": 2})
    problem.model.bias[23:] = -torch.inf
    problem.model.bias[4] = -torch.inf
    problem.ids[:4, 0], problem.ids[2, 1] = 4, 30
    upstream = torch.linspace(-1, 2, 11).double().unsqueeze(-1).expand(11, 4)
    one = by_topd(problem, "eager", upstream)
    leaves, sides = side_of(problem.model, rank)
    value, entropy = topd.linear_logprobs(*sides, problem.ids, return_entropy=True)
    value = torch.cat([value, entropy.unsqueeze(-1)], -1)
    grads = gradients(value, upstream, leaves)
    likely = topd.topk_logprobs(*sides, 25)  # three of them have a logit of -inf
    truth = {"value": one.value, "grads": one.grads}
    return {"value": value.detach(), "grads": grads, "truth": truth, "ids": likely.ids, "logprobs": likely.logprobs}


def lost_row(rank):
    """A row whose hidden state is NaN: with an upstream gradient, and without."""
    results = {}
    for name, m, weight in (("used", 1, 1.0), ("used by several", 3, 1.0), ("unused", 3, 0.0)):
        problem = random_problem({"bias": True, "rank": 2}, m=m)
        problem.model.hidden[5] = torch.nan
        upstream = torch.linspace(1, 2, 11 * (m + 1)).double().view(11, m + 1)
        upstream[5] = weight
        one = by_topd(problem, "eager", upstream)
        leaves, sides = side_of(problem.model, rank)
        value, entropy = topd.linear_logprobs(*sides, problem.ids, return_entropy=True)
        value = torch.cat([value, entropy.unsqueeze(-1)], -1)
        grads = gradients(value, upstream, leaves)
        results[name] = {"value": value.detach(), "grads": grads, "truth": {"value": one.value, "grads": one.grads}}
    return results


def other_hints(rank):
    """Hints that differ on the ranks, so that other rows deviate on each."""
    problem = random_problem({"bias": True, "rank": 2}, entropy=False)
    upstream = torch.ones(11, 3).double()
    leaves, sides = side_of(problem.model, rank)
    hint = torch.ones(11).index_fill(0, torch.tensor([2 + rank, 7]), 0.5)
    value = topd.linear_logprobs(*sides, problem.ids, weights_hint=hint)
    grads, true = gradients(value, upstream, leaves), plain(problem, upstream)
    return {"value": value.detach(), "grads": grads, "truth": {"value": true.value, "grads": true.grads}}


def no_rows(rank):
    results = []
    for mask in (None, torch.zeros(11, dtype=torch.bool)):
        n = 0 if mask is None else 11
        for m in (1, 3):
            leaves, sides = side_of(random_model(n, VOCAB, 7, bias=True, rank=2), rank)
            ids = torch.full((n, m), -100)
            value, entropy = topd.linear_logprobs(*sides, ids, mask=mask, return_entropy=True)
            rows = {"value": value.detach(), "entropy": entropy.detach()}
            results.append(rows | gradients(value.sum(-1) + entropy, torch.ones(n), leaves))
        topd.topk_logprobs(*sides, 3, mask=mask)
    return {"results": results}


def second_backward(rank):
    results = {}
    for m in (1, 3):
        problem = random_problem(OPTIONS["everything"], m=m)
        leaves, sides = side_of(problem.model, rank)
        value, entropy = topd.linear_logprobs(
            *sides, problem.ids, mask=problem.mask, return_entropy=True, workspace_bytes=30_000
        )
        each, grads = torch.cat([value, entropy.unsqueeze(-1)], -1), []
        for _ in range(2):
            each.backward(torch.linspace(-1, 2, each.numel()).double().view(each.shape), retain_graph=True)
            grads.append(torch.cat([leaves.weight.grad.flatten(), leaves.hidden.grad.flatten(), leaves.a.grad.flatten()]))
        results[m] = {"once": grads[0], "twice": grads[1]}
    return results


def two_runs(rank):
    """The same call twice, in float32: the bits that come."""
    problem, runs = random_problem(OPTIONS["everything"], n=64).to(torch.float32), []
    for _ in range(2):
        leaves, sides = side_of(problem.model, rank)
        value = topd.linear_logprobs(*sides, problem.ids, mask=problem.mask, workspace_bytes=60_000)
        grads = gradients(value, torch.linspace(-1, 2, value.numel()).view(value.shape), leaves)
        runs.append({"value": value.detach()} | grads)
    return {"runs": runs}


def gradcheck(rank):
    """Of what all ranks hold alike, hidden states and a: then all of them move the same entry."""
    passed = []
    for m in (1, 3):
        leaves, (hidden, head) = side_of(random_model(3, VOCAB, 7, rank=2, bias=True), rank)
        ids = torch.randint(VOCAB, (3, m))

        def value(hidden, a, leaves=leaves, head=head, ids=ids):
            own = replace(head, adapter=topd.LowRank(a, leaves.b, 0.5))
            return topd.linear_logprobs(hidden, own, ids, return_entropy=True)

        passed.append(torch.autograd.gradcheck(value, (hidden, leaves.a)))
    return {"passed": all(passed)}


def collectives(rank):
    """Count what a call of three chunks says, (gathers, reductions): in forward, in backward of a sum, and in backward of a
    number for each row."""
    results = {}
    for m, entropy in ((1, False), (3, False), (3, True)):
        _, sides = side_of(random_model(12, VOCAB, 7), rank)
        ids, bytes_of_row = torch.randint(VOCAB, (12, m)), 8 * 23 * (15 + entropy)
        with counted_collectives() as forward:
            value = topd.linear_logprobs(*sides, ids, return_entropy=entropy, workspace_bytes=4 * bytes_of_row)
        value = value[0] if entropy else value
        with counted_collectives() as of_sum:
            value.sum().backward(retain_graph=True)
        with counted_collectives() as of_rows:
            value.backward(torch.linspace(1, 2, 12).double().unsqueeze(-1).expand(12, m))
        results[m, entropy] = [tuple(counts.values()) for counts in (forward, of_sum, of_rows)]
    with counted_collectives() as counts:
        topd.topk_logprobs(*sides, 3, workspace_bytes=4 * 8 * 23 * 3)
    return results | {"topk": tuple(counts.values())}


def planted_faults(rank):
    """Gradients without the other shards' terms: those that forward sums, and those that backward sums."""
    results = {}
    adding_up, summed = hidden_sums.adding_up, OpShard.summed
    for name, m in (("forward", 1), ("backward", 3)):
        problem = random_problem({"rank": 2}, m=m, entropy=False)
        upstream = torch.linspace(-1, 2, 11 * m).double().view(11, m)
        leaves, sides = side_of(problem.model, rank)
        if name == "forward":
            hidden_sums.adding_up = lambda group, mine: adding_up(group, mine.clone())  # the sum comes, and is not used
        else:
            OpShard.summed = lambda self, mine: mine
        value = topd.linear_logprobs(*sides, problem.ids)
        grads = gradients(value, upstream, leaves)
        hidden_sums.adding_up, OpShard.summed = adding_up, summed
        true = plain(problem, upstream)
        results[name] = {"truth": true.grads, "value": (value.detach(), true.value), "grads": grads}
    return results


def dtensors(rank):
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))
    problem, placements = random_problem({"bias": True}, entropy=False), [Replicate(), Shard(0)]
    whole = (problem.model.weight, problem.model.bias)
    weight, bias = (distribute_tensor(tensor, mesh, placements).requires_grad_() for tensor in whole)
    hidden = problem.model.hidden.clone().requires_grad_()
    value = topd.linear_logprobs(hidden, topd.Head(weight, bias), problem.ids)
    value.sum().backward()
    assert isinstance(weight.grad, DTensor)
    grads = {"hidden": hidden.grad, "weight": weight.grad.full_tensor(), "bias": bias.grad.full_tensor()}
    true = plain(problem, torch.ones(11, 3))
    return {"value": value.detach(), "grads": grads, "truth": {"value": true.value, "grads": true.grads}}


def bfloat16(rank):
    """Hidden states and head of 16 bits: the same products as one process's."""
    problem = random_problem(EVERYTHING, n=32, entropy=False).to(torch.bfloat16)
    upstream = torch.linspace(-1, 2, 96).view(32, 3)
    one = by_topd(problem, "eager", upstream)
    leaves, sides = side_of(problem.model, rank)
    value = topd.linear_logprobs(*sides, problem.ids)
    grads = gradients(value, upstream, leaves)
    return {"value": value.detach(), "grads": grads, "truth": {"value": one.value, "grads": one.grads}}


def ties(rank):
    """Equal logits on both ranks: lower ranks first."""
    _, sides = side_of(Model(torch.ones(2, 1), torch.zeros(VOCAB, 1)), rank)
    few = topd.topk_logprobs(*sides, 30)
    return {"ids": few.ids, "logprobs": few.logprobs}


def refusals(rank):
    """Calls that are wrong on one rank alone, or that do not go together: every rank gets an error, none waits."""
    _, (hidden, head) = side_of(random_model(11, VOCAB, 7), rank)
    ids, probs = torch.arange(22).view(11, 2), torch.full((11, 2), 0.5 if rank == 0 else 0.7)
    shared = replace(head, shard=replace(head.shard, sequence_parallel=rank == 0))
    plan = torch.rand(1, 11, 2) * (1 if rank == 0 else -1)

    def call(states=hidden, own=head, ids=ids, **options):
        return message(lambda: topd.linear_logprobs(states, own, ids, **options))

    return {
        "ids outside": call(ids=ids + 20 * rank),
        "other ids": call(ids=ids + rank),
        "more ids": call(ids=ids[:, : 1 + rank]),
        "temperature": call(temperature=1.0 - rank),
        "states": call(states=hidden.detach() * (1 + 9 * rank)),
        "backend": call(backend="cpp"),
        "reference": call(backend="reference"),
        "sequence": call(own=shared),
        "k": message(lambda: topd.topk_logprobs(hidden, head, VOCAB + 1)),
        "other k": message(lambda: topd.topk_logprobs(hidden, head, 2 + rank)),
        "targets": message(lambda: topd.soft_target_kl(hidden, head, ids, probs)),
        "topk": message(lambda: topd.topk_divergence(hidden, head, ids, probs.log() * (1 - 2 * rank))),
        "plan": message(lambda: topd.guidance_kl(hidden[None], head, ids[:1], plan)),
        "small": call(workspace_bytes=100),
    }


if __name__ == "__main__":
    fork_cases(
        peaked,
        absent_tokens,
        lost_row,
        other_hints,
        no_rows,
        second_backward,
        two_runs,
        gradcheck,
        collectives,
        planted_faults,
        dtensors,
        bfloat16,
        ties,
        refusals,
    )
