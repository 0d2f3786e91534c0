"""What each response token costs: both models' states, paired with the token that they predict, through one divergence."""

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from topd.checks.values import check_range
from topd.head import Head
from topd.losses.linear_divergence import linear_divergence
from topd.objectives.config import OPDConfig
from topd.objectives.inputs import Inputs
from topd.objectives.reduction import reduction_hint
from topd.objectives.top_k import compare_top_k
from topd.scores import TokenScores


class TokenLosses(NamedTuple):
    """What each response token costs; everything is [B, T] or [N], 0 elsewhere.

    Attributes:
        loss: nats; differentiable in the student.
        scores: constants.
        unclipped: constant, the loss before position_clip; where it is above that, the token was clipped.
    """

    loss: Tensor
    scores: TokenScores
    unclipped: Tensor


class Rows(NamedTuple):
    """The rows of one divergence: states [..., H] of both sides, whether each counts (None: all do), the token that it
    predicts, what its loss will be multiplied by, and how a number of each row comes to the token's column."""

    student_hidden: Tensor
    teacher_hidden: Tensor
    mask: Tensor | None
    tokens: Tensor
    hint: Tensor | None
    by_token: Callable[[Tensor], Tensor]


def token_losses(student: tuple[Tensor, Head], teacher: tuple[Tensor, Head], inputs: Inputs, config: OPDConfig) -> TokenLosses:
    """Compare both models' states over a batch, each paired with the token that it predicts: one `linear_divergence`, or with
    top_k what `compare_top_k` runs.

    Args:
        student, teacher: hidden [B, T, H] or [N, H], each side's over its own batch, and the head.
    """
    rows = rows_of(student[0], teacher[0], inputs, config.reduction)
    sides = rows.student_hidden, student[1], rows.teacher_hidden, teacher[1].detach()
    if config.top_k is None:
        per_row, row_scores = linear_divergence(
            *sides,
            divergence=config.divergence,
            temperature=config.temperature,
            mask=rows.mask,
            tokens=rows.tokens,
            hard_weight=config.hard_weight,
            weights_hint=rows.hint,
            return_scores=True,
        )
    else:
        per_row, row_scores = compare_top_k(*sides, rows.mask, rows.tokens, config.top_k, config)
    loss, scores = rows.by_token(per_row), scores_by_token(row_scores, rows.by_token)
    return TokenLosses(clipped(loss, config), scores, loss.detach())


def clipped(loss: Tensor, config: OPDConfig) -> Tensor:
    """Return min(loss, position_clip) of each token, whose gradient is 0 where the clip is the smaller."""
    if config.position_clip is None:
        return loss
    check_range("position_clip", config.position_clip, loss.dtype)
    return loss.clamp(max=config.position_clip)


def rows_of(student_hidden: Tensor, teacher_hidden: Tensor, inputs: Inputs, reduction: str) -> Rows:
    """Return the rows to compare: of all columns, or with pairs of the response tokens alone."""
    rollouts, pairs = inputs.rollouts, inputs.pairs
    hint = reduction_hint(rollouts, reduction, inputs.token_weights)
    if pairs is None:
        return Rows(
            student_hidden[..., :-1, :],
            teacher_hidden[..., :-1, :],
            rollouts.response[..., 1:],
            rollouts.input_ids[..., 1:],
            None if hint is None else hint[..., 1:],
            partial(by_token, columns=rollouts.input_ids.shape[-1]),
        )
    return Rows(
        pairs.student_states(student_hidden),
        pairs.teacher_states(teacher_hidden),
        None,
        pairs.selected(rollouts.input_ids),
        None if hint is None else pairs.selected(hint),
        pairs.by_token,
    )


def by_token(value: Tensor, columns: int) -> Tensor:
    """Turn [..., T - 1], indexed by the state, into [..., T], indexed by the token; T may be 0."""
    return torch.cat([value.new_zeros(*value.shape[:-1], 1), value], dim=-1)[..., :columns]


def scores_by_token(scores: TokenScores, turn: Callable[[Tensor], Tensor]) -> TokenScores:
    """Turn scores of each row into scores indexed by the token."""
    given = {field.name: getattr(scores, field.name) for field in fields(scores)}
    turned: dict[str, Any] = {name: None if value is None else turn(value) for name, value in given.items()}
    return TokenScores(**turned)
