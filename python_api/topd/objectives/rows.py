"""The rows that a divergence compares: both models' states, each paired with the token that it predicts, and the way back."""

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from topd.objectives.inputs import Inputs
from topd.objectives.reduction import reduction_hint
from topd.scores import TokenScores


class Rows(NamedTuple):
    """The rows of one divergence, [..., H] and [...].

    Attributes:
        student_hidden, teacher_hidden: the states that predict the tokens.
        mask: bool, which rows count; None: all.
        tokens: int64.
        hint: what each row's loss will be multiplied by, up to one factor; None: the same for all.
        by_token: turns a number of each row into one of each token, in the shape of the student's input_ids.
    """

    student_hidden: Tensor
    teacher_hidden: Tensor
    mask: Tensor | None
    tokens: Tensor
    hint: Tensor | None
    by_token: Callable[[Tensor], Tensor]


def rows_of(student_hidden: Tensor, teacher_hidden: Tensor, inputs: Inputs, reduction: str) -> Rows:
    """Return the rows of a batch: with pairs the response tokens alone, [N], else all columns but one, under a mask.

    Args:
        student_hidden, teacher_hidden: [B, T, H] or [N, H], each side's states over its own batch.
    """
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
