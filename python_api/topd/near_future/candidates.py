"""Which tokens TOPD looks at: the candidates, tokens of high loss in each trajectory."""

from typing import get_args

import torch
from torch import Tensor

from topd.checks.values import check_rule_value, choice, positive_int
from topd.near_future.ranking import Ranking, check_batch, rank
from topd.options import CandidateRule

CANDIDATE_RULES: tuple[str, ...] = get_args(CandidateRule)


@torch.no_grad()
def select_candidates(
    score: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    rule: CandidateRule = "top_fraction",
    value: float = 0.0225,
    min_separation: int = 0,
) -> Tensor:
    """Return the positions of each trajectory whose score is highest: where TOPD looks into the near future.

    They are taken greedily from the highest score, ties to the smaller column. Each response has at least one, but under
    "threshold".

    Args:
        score: [B, T] floating; or [N], packed, with cu_seqlens. Not NaN where mask is True (inf is fine): checked on the CPU;
            on a GPU, where a check would stall it, the place of a NaN is undefined.
        mask: bool like score, True at the response tokens, which alone count and are read; None: all are.
        cu_seqlens: [B + 1] int32 offsets of the trajectories as flash-attn takes them, from 0 to N; checked on the CPU.
        rule: per trajectory of n response tokens: "top_fraction", the max(1, floor(value * n + 0.5)) highest; "top_k", the
            min(value, n) highest; "quantile", score >= their value-quantile (linear interpolation, as torch.quantile);
            "threshold", score >= value in the dtype of score, maybe none.
        value: a fraction in (0, 1], a count (int > 0), a quantile in [0, 1], or any finite number. The default belongs to
            "top_fraction": give every other rule its own.
        min_separation: a position fewer than so many columns from one already taken is skipped (0 and 1 skip none); then
            "top_fraction" and "top_k" go on until they have their number or none is left.

    Returns:
        [m, 2] int64 (row, column), or [m] int64 entries of a packed score; sorted.

    Raises:
        TypeError, ValueError: a wrong type, shape, dtype, device, range or option; a NaN score.

    Source: arXiv 2606.00305, 218 of 9,688 positions per trajectory: the default fraction. The rules, the score they are given,
    ties and separation are our choice.
    """
    choice("rule", rule, CANDIDATE_RULES)
    bound = check_rule_value("rule", rule, "value", value)
    if type(min_separation) is not int or min_separation != 0:
        positive_int("min_separation", min_separation, hint="or 0, for none")
    batch = check_batch(score, mask, cu_seqlens)
    ranking = rank(batch)
    quota = _quota(rule, bound, ranking.counts)
    if rule == "threshold":
        passing = ranking.score >= bound
    elif rule == "quantile":
        passing = _reach_quantile(ranking, bound)
    else:
        passing = ranking.rank < quota[ranking.row]
    chosen = torch.zeros_like(batch.score, dtype=torch.bool)
    if min_separation <= 1:
        chosen[ranking.entries] = passing
    else:
        eligible = slice(None) if rule.startswith("top") else passing
        chosen[_separated(ranking.row[eligible], ranking.entries[eligible], quota, min_separation)] = True
    return chosen.reshape(score.shape).nonzero() if cu_seqlens is None else chosen.nonzero()[:, 0]


def _quota(rule: str, value: float, counts: Tensor) -> Tensor:
    """Return how many candidates each trajectory may give, [B]."""
    if rule == "top_fraction":
        return (counts.double() * value + 0.5).floor().long().clamp_min(1).minimum(counts)
    return counts.clamp_max(min(value, torch.iinfo(counts.dtype).max)) if rule == "top_k" else counts


def _reach_quantile(ranking: Ranking, q: float) -> Tensor:
    """Tell which tokens reach their trajectory's quantile, rounded as torch.quantile rounds it; across an infinite gap the
    bound is its upper end."""
    if not ranking.entries.numel():
        return torch.zeros_like(ranking.entries, dtype=torch.bool)
    score = ranking.score.to(torch.promote_types(ranking.score.dtype, torch.float32))
    last = (ranking.counts - 1).clamp_min(0)
    place = torch.scalar_tensor(q, dtype=score.dtype, device=score.device) * last
    below = place.long()
    weight = place - below
    lowest = ranking.starts + last  # beyond the end for an empty trajectory, whose bound is any
    low = score[(lowest - below).clamp_max(score.numel() - 1)]
    high = score[(lowest - place.ceil().long()).clamp_max(score.numel() - 1)]
    between = torch.where((high - low).isfinite(), low.lerp(high, weight), high)
    bound = torch.where(weight == 0, low, between.clamp(low, high))
    return score >= bound[ranking.row]


def _separated(row: Tensor, entries: Tensor, quota: Tensor, separation: int) -> Tensor:
    """Take entries greedily, in the order given: each at least `separation` from those taken of its row, at most quota[row]."""
    left = quota.tolist()
    cells: dict[tuple[int, int], int] = {}  # of `separation` columns, so that each holds one entry at most
    for b, entry in zip(*torch.stack([row, entries]).tolist(), strict=True):
        if left[b]:
            cell = entry // separation
            near = (cells.get((b, cell + step)) for step in (-1, 0, 1))
            if all(other is None or abs(entry - other) >= separation for other in near):
                cells[b, cell] = entry
                left[b] -= 1
    return torch.tensor(list(cells.values()), dtype=torch.int64, device=entries.device)
