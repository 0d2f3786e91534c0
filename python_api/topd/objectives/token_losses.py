"""What each response token costs: both models' states, paired with the token that they predict, through one divergence."""

from typing import NamedTuple

from torch import Tensor

from topd.checks.values import check_range
from topd.head import Head
from topd.losses.linear_divergence import linear_divergence
from topd.objectives.config import OPDConfig
from topd.objectives.inputs import Inputs
from topd.objectives.rows import rows_of, scores_by_token
from topd.objectives.teacher_measures import TeacherMeasures, teacher_measures
from topd.objectives.top_k import compare_top_k
from topd.scores import TokenScores


class TokenLosses(NamedTuple):
    """What each response token costs; everything is [B, T] or [N], 0 elsewhere.

    Attributes:
        loss: nats; differentiable in the student.
        scores: constants.
        unclipped: constant, the loss before position_clip; where it is above that, the token was clipped.
        measures: what else the configuration asks of the teacher's distributions.
    """

    loss: Tensor
    scores: TokenScores
    unclipped: Tensor
    measures: TeacherMeasures = TeacherMeasures()


def token_losses(student: tuple[Tensor, Head], teacher: tuple[Tensor, Head], inputs: Inputs, config: OPDConfig) -> TokenLosses:
    """Compare both models' states over a batch, each paired with the token that it predicts: one `linear_divergence`, or with
    top_k what `compare_top_k` runs; and what `teacher_measures` runs, where the configuration asks for it.

    Args:
        student, teacher: hidden [B, T, H] or [N, H], each side's over its own batch, and the head.
    """
    rows = rows_of(student[0], teacher[0], inputs, config.reduction)
    heads = student[1], teacher[1].detach()
    if config.top_k is None:
        per_row, row_scores = linear_divergence(
            rows.student_hidden,
            heads[0],
            rows.teacher_hidden,
            heads[1],
            divergence=config.divergence,
            temperature=config.temperature,
            mask=rows.mask,
            tokens=rows.tokens,
            hard_weight=config.hard_weight,
            weights_hint=rows.hint,
            return_scores=True,
        )
    else:
        per_row, row_scores = compare_top_k(rows, *heads, config.top_k, config)
    loss, scores = rows.by_token(per_row), scores_by_token(row_scores, rows.by_token)
    measures = teacher_measures(rows, *heads, config)
    return TokenLosses(clipped(loss, config), scores, loss.detach(), measures)


def clipped(loss: Tensor, config: OPDConfig) -> Tensor:
    """Return min(loss, position_clip) of each token, whose gradient is 0 where the clip is the smaller."""
    if config.position_clip is None:
        return loss
    check_range("position_clip", config.position_clip, loss.dtype)
    return loss.clamp(max=config.position_clip)
