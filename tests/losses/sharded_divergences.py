"""linear_divergence and score_tokens on sharded heads in two to four processes; started by test_sharded_divergence.py."""

import torch
from compare import gradients
from shard_cases import sides_of
from shard_problems import Case, cases
from two_ranks import fork

import topd

N, BUDGET, LARGE_BUDGET = 11, 60_000, 64 << 20


def cases_of(ranks: int) -> dict[str, Case]:
    """Return what so many ranks compute: four all cases, two and three every second one."""
    return {name: case for number, (name, case) in enumerate(cases(N).items()) if ranks == 4 or number % 2 == ranks - 2}


def scores_of(scores: topd.TokenScores):
    return {name: getattr(scores, name) for name in scores.__dataclass_fields__}


def outcome(case: Case, dtype, starts, rank, **options):
    problem, (upstream, hint) = case.problem.to(dtype), case.weights
    student, sides = sides_of(problem, starts, rank)
    value, scores = topd.linear_divergence(*sides, **problem.options(), weights_hint=hint, return_scores=True, **options)
    return {"value": value.detach(), "grads": gradients(value, upstream, student), "scores": scores_of(scores)}


def scored(case: Case, dtype, starts, rank):
    """Return what score_tokens says, which reads no divergence."""
    problem = case.problem.to(dtype)
    _, sides = sides_of(problem, starts, rank)
    options = {"tokens": problem.tokens, "mask": problem.mask, "temperature": problem.temperature}
    return scores_of(topd.score_tokens(*sides, **options))


def work(rank):
    torch.distributed.init_process_group("gloo")
    ranks, results = torch.distributed.get_world_size(), {}
    for number, (name, case) in enumerate(cases_of(ranks).items()):
        cuts = case.starts(ranks)
        for starts in cuts if ranks == 2 else [cuts[number % len(cuts)]]:
            for dtype in (torch.float64, torch.float32):
                # Several chunks, or one. The ranks are given different budgets: they take the plan of the smallest.
                budget = (max(BUDGET, 600 * case.vocab) if number % 3 == 0 else LARGE_BUDGET) + 10_000 * rank
                results[dtype, name, starts] = outcome(case, dtype, starts, rank, workspace_bytes=budget)
                if number % 8 < 4:  # of four ranks with each option every vocabulary
                    results[dtype, name, starts]["scored"] = scored(case, dtype, starts, rank)
    return results


if __name__ == "__main__":
    fork(work)
