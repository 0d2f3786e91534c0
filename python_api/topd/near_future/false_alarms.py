"""What a false alarm, a candidate that does not diverge, weighs in the on-policy loss."""

from typing import get_args

import torch
from torch import Tensor

from topd.checks.tokens import check_position_form, refuse_positions, refuse_repeats
from topd.checks.values import check_tensor, choice
from topd.near_future.ranking import check_batch, rank
from topd.options import FalseAlarmMode

FALSE_ALARM_MODES: tuple[str, ...] = get_args(FalseAlarmMode)


@torch.no_grad()
def false_alarm_weights(
    score: Tensor,
    positions: Tensor,
    divergent: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    mode: FalseAlarmMode = "keep",
) -> Tensor:
    """Return what each token weighs in the on-policy loss: 1, but for the false alarms, the candidates that do not diverge.

    Args:
        score: [B, T] floating, or [N] with cu_seqlens: what each token costs, its detached loss, so that a false alarm adds no
            more than the median. Not NaN where it counts: checked on the CPU.
        positions: [m, 2] int64 (row, column), or [m] int64 with cu_seqlens, as `select_candidates` returns them: in range, not
            masked, distinct; checked on the CPU, on a GPU the check would stall it.
        divergent: [m] bool, as `divergent` returns it.
        mask: bool like score, True at the response tokens; None: all.
        cu_seqlens: [B + 1] int32, as in `select_candidates`.
        mode: at a false alarm "keep" gives 1; "mask" 0; "cap" 1 where score <= median, else max(median, 0) / score, with the
            lower median (torch.median) of its trajectory's response tokens.

    Returns:
        Like score, in its dtype ("cap" computes bfloat16 and float16 in float32), without a gradient.

    Raises:
        TypeError, ValueError: a wrong type, shape, dtype, device or option; a NaN score; a position out of range, masked or
            repeated.

    Source: arXiv 2606.00305: its objective keeps every token, "keep"; "cap" is its down-weighting ablation (5.1, the loss
    itself capped at the median), written as a weight. "mask" is our choice.
    """
    choice("mode", mode, FALSE_ALARM_MODES)
    batch = check_batch(score, mask, cu_seqlens)
    entries = _check_positions(positions, score, batch.mask)
    shape = ((entries.numel(),), "one for each of positions")
    check_tensor("divergent", divergent, dtype=torch.bool, shape=shape, device=(score.device, "score"))
    weights = torch.ones_like(batch.score)
    if mode == "mask":
        weights[entries] = divergent.to(weights.dtype)
    elif mode == "cap" and entries.numel():
        wide = torch.promote_types(score.dtype, torch.float32)
        ranking, row = rank(batch), batch.rows(entries)
        median = ranking.score[ranking.starts[row] + ranking.counts[row] // 2].to(wide)
        own = batch.score[entries].to(wide)
        capped = torch.where(median > 0, median / own, 0.0)
        weights[entries] = torch.where(divergent | (own <= median), 1.0, capped).to(weights.dtype)
    return weights.reshape(score.shape)


def _check_positions(positions: object, score: Tensor, mask: Tensor | None) -> Tensor:
    """Check positions, and return where they stand in the flat score, [m] int64."""
    checked = check_position_form(positions, score, "score")
    padded, remedy = score.dim() == 2, "pass select_candidates' own"
    entries = checked[:, 0] * score.shape[1] + checked[:, 1] if padded else checked
    if checked.device.type == "cpu":
        outside = (checked < 0) | (checked >= torch.tensor(score.shape))
        outside = outside.any(1) if padded else outside
        refuse_positions(outside, checked, f"lie in score, which is {list(score.shape)}", remedy)
        if mask is not None:
            refuse_positions(~mask[entries], checked, "be response tokens, where mask is True", remedy)
        refuse_repeats(entries, checked, remedy)
    return entries
