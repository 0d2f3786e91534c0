"""linear_logprobs and topk_logprobs on sharded heads in two or three processes; started by test_sharded_logprobs.py."""

from dataclasses import replace

import torch
from compare import TENSORS, Model, gradients
from logprob_cases import OPTIONS, Problem, random_problem
from shard_cases import BUDGET, STARTS, head_of, shard_of, starts_of
from two_ranks import fork

import topd

# The first token of each rank, by the vocabulary: 41 as in shard_cases; a rank with nothing; equal parts or nearly; large.
CUTS = {
    41: STARTS,
    5: {2: [(0, 5)], 3: [(0, 2, 2)]},
    37: {2: [(0, 19)], 3: [(0, 13, 26)]},
    38: {2: [(0, 19)], 3: [(0, 13, 26)]},
    5003: {2: [(0, 2000)], 3: [(0, 1668, 3336)]},
}
N = 12
UPSTREAMS = ("of all", "sum", "one deviates", "by row", "hinted")
K = 7


def problems():
    """Yield (name, vocabulary, problem, kind of upstream gradient)."""
    for number, (name, options) in enumerate(OPTIONS.items()):
        kinds = UPSTREAMS if name in ("plain", "everything") else ("of all", UPSTREAMS[number % 4 - 4])
        for m in (0, 1, 3):
            for kind in kinds:
                if m or kind == "of all":
                    yield f"{name} m={m} {kind}", 41, _problem(options, m, 41, kind), kind
    for vocab in (5, 37, 38, 5003):
        for m, kind in ((1, "sum"), (4, "of all")):
            yield f"everything v={vocab} {kind}", vocab, _problem(OPTIONS["everything"], m, vocab, kind), kind


def _problem(options, m, vocab, kind) -> Problem:
    torch.manual_seed(m + vocab)
    return random_problem(options, m=m, vocab=vocab, n=N, entropy=kind == "of all" or m == 0)


def upstream_of(problem: Problem, kind: str) -> torch.Tensor:
    """Return the gradients that come to a row's log-probabilities and, in a last column, to its entropy."""
    torch.manual_seed(1)
    width = problem.ids.shape[1] + problem.entropy
    if kind == "of all":
        return problem.upstream()
    ones = torch.ones((), dtype=torch.float64).expand(N, width)
    if kind == "one deviates":
        return ones.index_fill(0, torch.tensor([4]), 0.0)
    return ones if kind == "sum" else ones * torch.linspace(-1, 2, N).unsqueeze(-1)


def outcome(problem: Problem, starts, rank, kind, **options):
    student = shard_of(problem.model, starts, rank).leaves(TENSORS)
    head = head_of(student, starts, rank, problem.model.weight.shape[0])
    hint = torch.linspace(-1, 2, N) if kind == "hinted" else None
    return outcome_of(
        problem, student, head, None if kind == "sum" else upstream_of(problem, kind), weights_hint=hint, **options
    )


def outcome_of(problem: Problem, student: Model, head: topd.Head, upstream: torch.Tensor | None, **options):
    """Return values and gradients; `upstream`: what comes for them, None: a sum."""
    options |= {"temperature": problem.temperature, "mask": problem.mask, "return_entropy": problem.entropy}
    value = topd.linear_logprobs(student.hidden, head, problem.ids, **options)
    if upstream is None:
        value.sum().backward()
        return {
            "value": value.detach(),
            "grads": {name: leaf.grad for name in TENSORS if (leaf := getattr(student, name)) is not None},
        }
    if problem.entropy:
        value = torch.cat([value[0], value[1].unsqueeze(-1)], -1)
    return {"value": value.detach(), "grads": gradients(value, upstream, student)}


def likely(problem: Problem, starts, rank):
    """Return the k likeliest tokens, more than a rank may hold."""
    model, vocab = shard_of(problem.model, starts, rank), problem.model.weight.shape[0]
    options = {"temperature": problem.temperature, "mask": problem.mask}
    return tuple(topd.topk_logprobs(model.hidden, head_of(model, starts, rank, vocab), min(K, vocab), **options))


def work(rank):
    torch.distributed.init_process_group("gloo")
    ranks, results = torch.distributed.get_world_size(), {}
    for dtype in (torch.float64, torch.float32):
        for number, (name, vocab, problem, kind) in enumerate(problems()):
            budget = max(BUDGET, 8 * 40 * vocab) + 10_000 * rank  # the ranks take the plan of the smallest
            for starts in starts_of(ranks, number, CUTS[vocab]):
                one = problem.to(dtype)
                results[dtype, name, starts] = outcome(one, starts, rank, kind, workspace_bytes=budget)
                if kind == "of all":
                    results[dtype, name, starts]["topk"] = likely(replace(one), starts, rank)
    return results


if __name__ == "__main__":
    fork(work)
