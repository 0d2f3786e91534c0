"""Contenders for the transport between window pairs: topd, POT's batched solver at two tolerances, a loop of its ot.sinkhorn.

Each starts from token ids and the table and returns distances and plans. topd's tolerance is the largest error of a row or
column sum in units of a marginal, POT's an L2 norm over a problem's rows: "ot.batch" is given the same number, "ot.batch
matched" that number over K, which is what topd's means.
"""

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import topd

VOCAB = 49152


class Pairs(NamedTuple):
    student: Tensor  # [m, K]
    teacher: Tensor
    embedding: Tensor  # [V, d]


class Solution(NamedTuple):
    distance: Tensor  # [m]
    plan: Tensor  # [m, K, K]

    @property
    def row_error(self) -> float:
        """Return the largest error of a row's sum, in units of its marginal."""
        return float((self.plan.sum(-1) * self.plan.shape[1] - 1).abs().max())


def make_pairs(m: int, window: int, width: int, seed: int = 0) -> Pairs:
    """Make embeddings as random clusters with a common direction, as those of language models have; windows share half of their
    tokens."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(256, width, generator=generator)
    which = torch.randint(256, (VOCAB,), generator=generator)
    embedding = torch.randn(VOCAB, width, generator=generator)
    embedding += centres[which] + 0.7 * torch.randn(1, width, generator=generator)
    student = torch.randint(VOCAB, (m, window), generator=generator)
    other = torch.randint(VOCAB, (m, window), generator=generator)
    shuffled = student[:, torch.randperm(window, generator=generator)]
    teacher = torch.where(torch.rand(m, window, generator=generator) < 0.5, shuffled, other)
    return Pairs(student, teacher, embedding)


def ours(pairs: Pairs, epsilon: float, tolerance: float) -> Solution:
    transport = topd.near_future_divergence(*pairs, epsilon=epsilon, tolerance=tolerance)
    return Solution(transport.distance, transport.plan)


def _costs(pairs: Pairs) -> Tensor:
    x, y = (torch.nn.functional.normalize(pairs.embedding[ids], dim=-1) for ids in (pairs.student, pairs.teacher))
    return 1 - x @ y.transpose(1, 2)


def batched(pairs: Pairs, epsilon: float, tolerance: float) -> Solution:
    import ot

    costs = _costs(pairs)
    plan = ot.batch.solve_batch(costs, reg=epsilon, max_iter=20_000, tol=tolerance, grad="detach").plan
    return Solution((plan * costs).sum((1, 2)), plan)


def one_by_one(pairs: Pairs, epsilon: float, tolerance: float) -> Solution:
    import ot

    costs, window = _costs(pairs).double().numpy(), pairs.student.shape[1]
    uniform = [1.0 / window] * window
    plans = [ot.sinkhorn(uniform, uniform, cost, epsilon, numItermax=20_000, stopThr=tolerance) for cost in costs]
    plan = torch.stack([torch.as_tensor(each) for each in plans])
    return Solution((plan * torch.from_numpy(costs)).sum((1, 2)), plan)


def contenders(pairs: Pairs, epsilon: float, tolerance: float) -> dict[str, Callable[[], Solution]]:
    """Return the contenders by name; topd alone where POT is not installed."""
    runs: dict[str, Callable[[], Solution]] = {"topd": partial(ours, pairs, epsilon, tolerance)}
    if importlib.util.find_spec("ot") is None:
        return runs
    return runs | {
        "ot.batch": partial(batched, pairs, epsilon, tolerance),
        "ot.batch matched": partial(batched, pairs, epsilon, tolerance / pairs.student.shape[1]),
        "loop of ot.sinkhorn": partial(one_by_one, pairs, epsilon, tolerance),
    }
