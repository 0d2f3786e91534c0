"""linear_divergence in two to four processes that share the vocabulary and the sequence; started by
test_sequence_parallel.py."""

import torch
from sequence_cases import N, outcome, problems, starts_of
from shard_problems import LARGE, Case, cases
from two_ranks import fork

# What comes for each row of the whole sequence, and the hint.
WEIGHTS = {
    "sum": (lambda: torch.ones(()).expand(N), None),
    "a rank's own mean": (lambda: torch.linspace(1, 4, N).floor(), None),
    "one deviates": (lambda: torch.ones(N).index_fill(0, torch.tensor([4]), 0.0), None),
    "all deviate": (lambda: torch.linspace(-1, 2, N), None),
    "hinted": (lambda: 3 * torch.linspace(0.5, 2, N), lambda: torch.linspace(0.5, 2, N)),
    "wrong hint": (lambda: torch.linspace(-1, 2, N), lambda: torch.linspace(2, 0.5, N).double()),
}
BUDGET = 30_000


def weights_of(number: int):
    """Return the kind, upstream gradient and hint of the problem of this number."""
    kind = list(WEIGHTS)[number % len(WEIGHTS)]
    upstream, hint = WEIGHTS[kind]
    return kind, upstream(), None if hint is None else hint()


def wide_cases() -> dict[str, Case]:
    """Return what four ranks compute beside: 5,003 tokens, and logits of -inf."""
    return {name: case for name, case in cases(N).items() if case.vocab == LARGE or name.startswith("absent")}


def work(rank):
    torch.distributed.init_process_group("gloo")
    ranks, results = torch.distributed.get_world_size(), {}
    for dtype in (torch.float64, torch.float32)[: 1 if ranks == 4 else 2]:  # four ranks on few cores take their time
        for number, (name, problem) in enumerate(problems()):
            starts = starts_of(ranks, min(problem.student.weight.shape[0], problem.teacher.weight.shape[0]))
            _, upstream, hint = weights_of(number)
            # The ranks are given different budgets: they take the plan of the smallest.
            budget = {"workspace_bytes": BUDGET + 10_000 * rank}
            results[dtype, name] = outcome(problem.to(dtype), starts, rank, upstream, hint, **budget)
    for name, case in wide_cases().items() if ranks == 4 else ():
        starts, (upstream, hint) = starts_of(ranks, case.vocab), case.weights
        for dtype in (torch.float64, torch.float32):
            results[dtype, name] = outcome(case.problem.to(dtype), starts, rank, upstream, hint)
    return results


if __name__ == "__main__":
    fork(work)
