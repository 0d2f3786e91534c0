"""Good calls of the losses, with arguments to exchange."""

from typing import Any

import torch

import topd

N, V, H, M = 4, 6, 3, 2


def f32(*shape: int) -> torch.Tensor:
    return torch.ones(shape)


def head(**options: Any) -> topd.Head:
    return topd.Head(f32(V, H), **options)


def call(**changes: Any) -> Any:
    """Run a good call of linear_divergence with some arguments exchanged."""
    sides = {"student_hidden": f32(N, H), "student": head(), "teacher_hidden": f32(N, H), "teacher": head()}
    return topd.linear_divergence(**(sides | changes))


def scored(**changes: Any) -> Any:
    """Run the same for score_tokens."""
    sides = {"student_hidden": f32(N, H), "student": head(), "teacher_hidden": f32(N, H), "teacher": head()}
    return topd.score_tokens(**(sides | changes))


def chosen(**changes: Any) -> Any:
    """Run a good call of linear_logprobs with some arguments exchanged."""
    good = {"hidden": f32(N, H), "head": head(), "ids": f32(N, M).long()}
    return topd.linear_logprobs(**(good | changes))


def top(**changes: Any) -> Any:
    """Run the same for topk_logprobs."""
    return topd.topk_logprobs(**({"hidden": f32(N, H), "head": head(), "k": 2} | changes))


def low_rank(*, rank: int = 2, width: int = H, vocab: int = V, dtype: torch.dtype = torch.float32) -> topd.LowRank:
    return topd.LowRank(torch.ones(rank, width, dtype=dtype), torch.ones(vocab, rank, dtype=dtype), 1.0)


def grad(*shape: int) -> torch.Tensor:
    return f32(*shape).requires_grad_()
