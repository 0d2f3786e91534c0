"""linear_logprobs, topk_logprobs and what is made of them in two or three processes that share the vocabulary and the sequence;
started by test_sequence_logprobs.py. A function is named like its result."""

from dataclasses import replace

import soft_target_cases
import topk_cases
import torch
import torch.distributed as dist
from compare import TENSORS, Model, gradients, random_model
from compare import outcome_of as compare_outcome
from logprob_cases import OPTIONS, Problem, plain, random_problem
from sequence_cases import head_of, rows_of_rank, starts_of
from shard_cases import counted_collectives, shard_of
from sharded_logprobs import K, N, outcome_of, problems, upstream_of
from two_ranks import fork_cases, message

import topd

VOCAB = 41
EVERYTHING = {"bias": True, "rank": 3, "softcap": 8.0, "scale": 0.8}


def mine(value, rank):
    """Return this rank's rows of what is given for the whole sequence."""
    return rows_of_rank(value, rank, dist.get_world_size())


def side_of(model: Model, rank: int, like: Model | None = None) -> tuple[Model, topd.Head]:
    """Return this rank's leaves of a model, with its rows and its tokens, and their head; cut at the tokens of another."""
    vocab = model.weight.shape[0]
    starts = starts_of(dist.get_world_size(), vocab if like is None else like.weight.shape[0])
    leaves = shard_of(replace(model, hidden=mine(model.hidden, rank)), starts, rank).leaves(TENSORS)
    return leaves, head_of(leaves, starts[rank], vocab)


def outcome(problem: Problem, rank: int, kind: str, **options):
    student, head = side_of(problem.model, rank)
    part = replace(problem, ids=mine(problem.ids, rank), mask=mine(problem.mask, rank))
    hint = mine(torch.linspace(-1, 2, N), rank) if kind == "hinted" else None
    upstream = None if kind == "sum" else mine(upstream_of(problem, kind), rank)
    result = outcome_of(part, student, head, upstream, weights_hint=hint, **options)
    likely = topd.topk_logprobs(
        student.hidden, head, min(K, problem.model.weight.shape[0]), temperature=problem.temperature, mask=part.mask
    )
    return result | {"topk": tuple(likely)}


def options(rank):
    return {
        (dtype, name): outcome(problem.to(dtype), rank, kind, workspace_bytes=max(40_000, 320 * vocab) + 10_000 * rank)
        for dtype in (torch.float64, torch.float32)
        for name, vocab, problem, kind in problems()
    }


def compositions(rank):
    """What is made of them: values and gradients on this rank, and the truth on the whole head and all rows."""
    results, mask = {}, torch.arange(N) % 4 != 2
    model, teacher = random_model(N, VOCAB, 7, **EVERYTHING), random_model(N, 53, 5, bias=True)

    def compared(name, compute, true, model=model):
        leaves, head = side_of(model, rank)
        value, upstream = (
            compute(leaves.hidden, head),
            torch.linspace(-1, 2, true.value.numel(), dtype=torch.float64).view_as(true.value),
        )
        grads = gradients(value, mine(upstream, rank), leaves)
        results[name] = {"value": value.detach(), "grads": grads, "truth": {"value": true.value, "grads": true.grads}}

    ids, probs = soft_target_cases.random_targets(N, 6)
    true = soft_target_cases.truth(model, ids, probs, mask=mask, temperature=0.7)
    given = {"mask": mine(mask, rank), "temperature": 0.7}
    compared("soft targets", lambda *side: topd.soft_target_kl(*side, mine(ids, rank), mine(probs, rank), **given), true)

    ids, logprobs = topk_cases.random_teacher(N, 6)
    for direction, support in topk_cases.COMBINATIONS:
        kinds = {"direction": direction, "support": support}
        true = topk_cases.truth(model, ids, logprobs, mask=mask, **kinds)
        given, part = (mine(ids, rank), mine(logprobs, rank)), kinds | {"mask": mine(mask, rank)}
        compared(f"{direction} {support}", lambda *side: topd.topk_divergence(*side, *given, **part), true)  # noqa: B023

    given = {"top_k": 5, "entropy_threshold": 1.0, "mask": mask}
    whole = teacher.hidden, teacher.head()
    true = compare_outcome(model, None, lambda own: topd.entropy_aware_opd(own.hidden, own.head(), *whole, **given))
    part, other = side_of(teacher, rank, like=model)
    others, given = (part.hidden.detach(), other.detach()), given | {"mask": mine(mask, rank)}
    compared("entropy aware", lambda *side: topd.entropy_aware_opd(*side, *others, **given), true)

    windows, plan, tokens = random_model((6, 5), VOCAB, 7, **EVERYTHING), torch.rand(6, 5, 6), torch.randint(VOCAB, (6, 6))
    true = compare_outcome(windows, None, lambda own: topd.guidance_kl(own.hidden, own.head(), tokens, plan))
    compared("guidance", lambda *side: topd.guidance_kl(*side, mine(tokens, rank), mine(plan, rank)), true, windows)
    return results


def other_results(rank):
    """Ranks that use other results of one call: a result that another rank uses gets its gradient all the same."""
    results = {}
    for name, used in (("log-probabilities", (0, None)), ("entropy", (None, 1)), ("one each", (0, 1))):
        problem = random_problem(OPTIONS["everything"], n=N)
        student, head = side_of(problem.model, rank)
        options = {"temperature": problem.temperature, "mask": mine(problem.mask, rank), "return_entropy": True}
        pair = topd.linear_logprobs(student.hidden, head, mine(problem.ids, rank), **options)
        result = used[rank % 2]  # the first rank uses the first of `used`, the second the other
        (0 * pair[0].sum() if result is None else pair[result].sum()).backward()
        upstream = torch.zeros(N, 4, dtype=torch.float64)
        for owner, rows in enumerate(upstream.chunk(dist.get_world_size())):
            rows[:, :3], rows[:, 3] = used[owner % 2] == 0, used[owner % 2] == 1
        true = plain(problem, upstream)
        grads = {key: getattr(student, key).grad for key in TENSORS}
        value = torch.cat([pair[0], pair[1].unsqueeze(-1)], -1).detach()
        results[name] = {"value": value, "grads": grads, "truth": {"value": true.value, "grads": true.grads}}
    return results


def few_rows(rank):
    """No rows at all; and rows of which one rank has none that counts."""
    results, ranks = [], dist.get_world_size()
    for n in (0, N):
        model = random_model(n, VOCAB, 7, bias=True, rank=2)
        leaves, head = side_of(model, rank)
        mask = None if n == 0 else torch.full((n // ranks,), rank != 0)
        ids = torch.full((n // ranks, 2), 3 if rank else -100)
        value, entropy = topd.linear_logprobs(leaves.hidden, head, ids, mask=mask, return_entropy=True)
        grads = gradients(value.sum(-1) + entropy, torch.ones(n // ranks), leaves)
        likely = topd.topk_logprobs(leaves.hidden, head, 3, mask=mask)
        results.append({"value": value.detach(), "entropy": entropy.detach(), "ids": likely.ids} | grads)
    return {"results": results}


def collectives(rank):
    """Count what calls of one chunk say beside calls that take all rows on every rank: (gathers, reductions). No row's upstream
    gradient is another's."""
    results = {}
    for shared in (True, False):
        model = random_model(N, VOCAB, 7)
        student, head = side_of(model, rank)
        hidden = student.hidden if shared else model.hidden.clone().requires_grad_()
        head = replace(head, shard=replace(head.shard, sequence_parallel=shared))
        ids = torch.randint(VOCAB, (hidden.shape[0], 3))
        with counted_collectives() as forward:
            value = topd.linear_logprobs(hidden, head, ids)
        with counted_collectives() as backward:
            value.backward(torch.linspace(1, 2, value.numel()).double().view(value.shape))
        with counted_collectives() as topk:
            topd.topk_logprobs(hidden, head, 3)
        results[shared] = [tuple(counts.values()) for counts in (forward, backward, topk)]
    return results


def two_runs(rank):
    problem, runs = random_problem(OPTIONS["everything"], n=N).to(torch.float32), []
    for _ in range(2):
        runs.append(outcome(problem, rank, "by row", workspace_bytes=40_000))
    return {"runs": runs}


def refusals(rank):
    """Calls that do not go together: every rank gets an error, none waits."""
    student, head = side_of(random_model(N, VOCAB, 7), rank)
    ids = torch.full((student.hidden.shape[0], 2), 3)

    def call(hidden=student.hidden, ids=ids, **options):
        return message(lambda: topd.linear_logprobs(hidden, head, ids[: hidden.shape[0]], **options))

    last = rank == dist.get_world_size() - 1
    return {
        "rows": call(student.hidden.detach()[: len(ids) - last]),
        "ids": call(ids=torch.full_like(ids, VOCAB) if last else ids),
        "mask": call(mask=None if last else torch.ones(len(ids), dtype=torch.bool)),
        "k": message(lambda: topd.topk_logprobs(student.hidden, head, 2 + last)),
    }


if __name__ == "__main__":
    fork_cases(options, compositions, other_results, few_rows, collectives, two_runs, refusals)
