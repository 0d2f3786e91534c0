"""The scores of a batch's response tokens, ranked within their trajectory.

A batch is flat here: trajectory b owns the entries bounds[b] .. bounds[b + 1] of a score [N], whether it came padded, [B, T],
or packed. One ranking (by trajectory, highest score first, ties to the smaller column) serves the rules and the median.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from topd.checks.tokens import check_offsets
from topd.checks.values import FLOATING, check_tensor, per_token, refuse_nan


class FlatBatch(NamedTuple):
    """A batch's scores, flat.

    Attributes:
        score: [N], detached.
        mask: [N] bool, True at the response tokens; None: all are.
        bounds: [B + 1] int64, where each trajectory's entries begin and end.
    """

    score: Tensor
    mask: Tensor | None
    bounds: Tensor

    def rows(self, entries: Tensor) -> Tensor:
        """Return the trajectory of each entry; the last one's where cu_seqlens, unchecked on a GPU, ends too early."""
        return torch.bucketize(entries, self.bounds[1:], right=True).clamp_max(self.bounds.numel() - 2)


class Ranking(NamedTuple):
    """A batch's n response tokens by trajectory, the highest score first.

    Attributes:
        entries: [n] int64, where each stands in the flat score.
        score: [n].
        row: [n] int64, its trajectory.
        rank: [n] int64, its place in the trajectory, from 0.
        starts, counts: [B] int64, where each trajectory's tokens begin here, and how many they are.
    """

    entries: Tensor
    score: Tensor
    row: Tensor
    rank: Tensor
    starts: Tensor
    counts: Tensor


def check_batch(score: object, mask: object, cu_seqlens: object) -> FlatBatch:
    """Check a score with its mask and offsets, and return them flat."""
    checked = check_tensor("score", score, dtype=FLOATING)
    if checked.dim() != (2 if cu_seqlens is None else 1):
        rule = "[B, T] without cu_seqlens" if cu_seqlens is None else "[N] with cu_seqlens"
        raise ValueError(f"score must be {rule}, got {list(checked.shape)}; pass cu_seqlens for a packed batch, and only then")
    flat_mask = None if mask is None else per_token("mask", mask, torch.bool, checked.unsqueeze(-1), "score")
    if cu_seqlens is None:
        bounds = torch.arange(checked.shape[0] + 1, device=checked.device) * checked.shape[1]
    else:
        bounds = check_offsets(cu_seqlens, checked, "score")
    refuse_nan("score", checked, None if flat_mask is None else flat_mask.reshape(checked.shape), "mask it out")
    return FlatBatch(checked.detach().reshape(-1), flat_mask, bounds)


def rank(batch: FlatBatch) -> Ranking:
    """Rank the response tokens of each trajectory, ties to the smaller column."""
    score, mask, bounds = batch
    entries = torch.arange(score.numel(), device=score.device) if mask is None else mask.nonzero()[:, 0]
    row, kept = batch.rows(entries), score[entries] + 0.0  # -0.0 becomes 0.0, with which it ties
    order = kept.argsort(descending=True, stable=True)
    order = order[row[order].argsort(stable=True)]
    row = row[order]
    counts = bounds.new_zeros(bounds.numel() - 1).scatter_add_(0, row, torch.ones_like(row))
    starts = counts.cumsum(0) - counts
    place = torch.arange(row.numel(), device=row.device) - starts[row]
    return Ranking(entries[order], kept[order], row, place, starts, counts)
