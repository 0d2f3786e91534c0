"""linear_divergence and score_tokens on sharded heads in two or three processes; started by test_sharded_divergence.py."""

import torch
from compare import Problem, gradients
from shard_cases import BUDGET, problems, sides_of, starts_of
from two_ranks import fork

import topd

UPSTREAMS = {
    "sum": lambda n: torch.ones(()).expand(n),
    "mean": lambda n: torch.full((n,), 1 / n),
    "one deviates": lambda n: torch.ones(n).index_fill(0, torch.tensor([4]), 0.0),
    "all deviate": lambda n: torch.linspace(-1, 2, n),
}


def outcome(problem: Problem, starts, rank, upstream, **options):
    student, sides = sides_of(problem, starts, rank)
    value, scores = topd.linear_divergence(*sides, **problem.options(), return_scores=True, **options)
    fields = {name: getattr(scores, name) for name in scores.__dataclass_fields__}
    return {"value": value.detach(), "grads": gradients(value, upstream, student), "scores": fields}


def work(rank):
    torch.distributed.init_process_group("gloo")
    ranks, results = torch.distributed.get_world_size(), {}
    for dtype in (torch.float64, torch.float32):
        for number, (name, problem) in enumerate(problems()):
            kinds = list(UPSTREAMS.items())
            for starts in starts_of(ranks, number):
                kind, upstream = kinds[number % len(kinds)]
                # The ranks are given different budgets: they take the plan of the smallest.
                result = outcome(problem.to(dtype), starts, rank, upstream(11), workspace_bytes=BUDGET + 10_000 * rank)
                results[dtype, name, starts] = result | {"upstream": kind}
    return results


if __name__ == "__main__":
    fork(work)
