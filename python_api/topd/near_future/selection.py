"""Which tokens TOPD looks at: candidates of high loss, the divergent ones among them, what a false alarm weighs in the loss.

A batch is flat here: trajectory b owns the entries bounds[b] .. bounds[b + 1] of a score [N], whether it came padded, [B, T],
or packed. One ranking (by trajectory, highest score first, ties to the smaller column) serves the rules and the median.
"""

import math
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from topd.checks.values import choice, floating, on_device, positive_int, real, shaped
from topd.losses.operands import check_offsets, per_token, typed
from topd.options import CandidateRule, FalseAlarmMode, GateRule

CANDIDATE_RULES: tuple[str, ...] = get_args(CandidateRule)
GATE_RULES: tuple[str, ...] = get_args(GateRule)
GATE_VALUES: dict[GateRule, float | None] = {"lowest_fraction_out": 0.3, "threshold": None, "mean_plus_std": 1.0}
FALSE_ALARM_MODES: tuple[str, ...] = get_args(FalseAlarmMode)


class _Batch(NamedTuple):
    score: Tensor  # [N], detached
    mask: Tensor | None  # [N] bool
    bounds: Tensor  # [B + 1] int64

    def rows(self, at: Tensor) -> Tensor:
        """The trajectory of each entry; the last one's where cu_seqlens, unchecked on a GPU, ends too early."""
        return torch.bucketize(at, self.bounds[1:], right=True).clamp_max(self.bounds.numel() - 2)


class _Ranking(NamedTuple):
    at: Tensor  # [n] the response tokens' entries
    score: Tensor  # [n]
    row: Tensor  # [n] trajectory
    rank: Tensor  # [n] place in the trajectory, from 0
    starts: Tensor  # [B] where each trajectory's begin
    counts: Tensor  # [B]


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
    """The positions of each trajectory whose score is highest: where TOPD looks into the near future.

    Taken greedily from the highest score, ties to the smaller column. Each response has at least one, but under "threshold".

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
    bound = _check_value(rule, value)
    if type(min_separation) is not int or min_separation != 0:
        positive_int("min_separation", min_separation, hint="or 0, for none")
    batch = _check_batch(score, mask, cu_seqlens)
    found = _rank(batch)
    quota = _quota(rule, bound, found.counts)
    if rule == "threshold":
        passing = found.score >= bound
    elif rule == "quantile":
        passing = _reach_quantile(found, bound)
    else:
        passing = found.rank < quota[found.row]
    chosen = torch.zeros_like(batch.score, dtype=torch.bool)
    if min_separation <= 1:
        chosen[found.at] = passing
    else:
        eligible = slice(None) if rule.startswith("top") else passing
        chosen[_separated(found.row[eligible], found.at[eligible], quota, min_separation)] = True
    return chosen.reshape(score.shape).nonzero() if cu_seqlens is None else chosen.nonzero()[:, 0]


@torch.no_grad()
def divergent(distance: Tensor, *, rule: GateRule = "lowest_fraction_out", value: float | None = None) -> Tensor:
    """Which candidates really diverge: those whose near-future distance is high too. The others are false alarms.

    Args:
        distance: [m] floating, of all of the batch's candidates. Not NaN: checked on the CPU; on a GPU, where a check would
            stall it, its place under "lowest_fraction_out" is undefined, and the other rules call it no divergence.
        rule: "lowest_fraction_out", all but the floor(value * m + 1e-9) lowest, of equal ones the earlier goes out first;
            "threshold", distance > value in the dtype of distance; "mean_plus_std", distance > mean + value * std, the
            population's, in float64.
        value: a fraction in [0, 1], None: 0.3 (of 3 candidates or fewer none goes out); a finite number, required; a finite
            number, None: 1.0.

    Returns:
        [m] bool.

    Raises:
        TypeError, ValueError: a wrong type, shape, dtype, range or option; no value for "threshold"; a NaN distance.

    Source: arXiv 2606.00305, which asks for a high distance and gives no rule: all three are our choice; 0.3 follows its
    29.23 % of high-loss tokens whose distance is under the upper quartile of the low-loss ones.
    """
    choice("rule", rule, GATE_RULES)
    bound = _check_value(rule, GATE_VALUES[rule] if value is None else value)
    if floating("distance", distance).dim() != 1:
        raise ValueError(f"distance must be [m], one for each candidate, got {list(distance.shape)}; flatten it")
    _refuse_nan("distance", distance, None, "its windows or embeddings hold a NaN")
    if rule == "threshold":
        return distance > bound
    if rule == "mean_plus_std":
        wide = distance.double() - distance[:1].double()  # equal distances: exact zeros, so that none is above the mean
        mean = wide.mean()
        return wide > mean + bound * (wide - mean).square().mean().sqrt()
    out = math.floor(bound * distance.numel() + 1e-9)
    high = torch.ones_like(distance, dtype=torch.bool)
    high[(distance + 0.0).argsort(stable=True)[:out]] = False
    return high


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
    """What each token weighs in the on-policy loss: 1, but for the false alarms, the candidates that do not diverge.

    Args:
        score: [B, T] floating, or [N] with cu_seqlens, by which the candidates were selected; NaN as there.
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

    Source: arXiv 2606.00305: its objective keeps every token, "keep"; "cap" is its down-weighting ablation, written as a
    weight. "mask" is our choice.
    """
    choice("mode", mode, FALSE_ALARM_MODES)
    batch = _check_batch(score, mask, cu_seqlens)
    at = _check_positions(positions, score, batch.mask)
    shaped("divergent", typed("divergent", divergent, torch.bool), (at.numel(),), "one for each of positions")
    on_device("divergent", divergent, score.device, "score")
    weights = torch.ones_like(batch.score)
    if mode == "mask":
        weights[at] = divergent.to(weights.dtype)
    elif mode == "cap" and at.numel():
        wide = torch.promote_types(score.dtype, torch.float32)
        found, row = _rank(batch), batch.rows(at)
        median = found.score[found.starts[row] + found.counts[row] // 2].to(wide)
        mine = batch.score[at].to(wide)
        capped = torch.where(median > 0, median / mine, 0.0)
        weights[at] = torch.where(divergent | (mine <= median), 1.0, capped).to(weights.dtype)
    return weights.reshape(score.shape)


def _rank(batch: _Batch) -> _Ranking:
    score, mask, bounds = batch
    at = torch.arange(score.numel(), device=score.device) if mask is None else mask.nonzero()[:, 0]
    row, kept = batch.rows(at), score[at] + 0.0  # -0.0 becomes 0.0, with which it ties
    order = kept.argsort(descending=True, stable=True)
    order = order[row[order].argsort(stable=True)]
    row = row[order]
    counts = bounds.new_zeros(bounds.numel() - 1).scatter_add_(0, row, torch.ones_like(row))
    starts = counts.cumsum(0) - counts
    return _Ranking(at[order], kept[order], row, torch.arange(row.numel(), device=row.device) - starts[row], starts, counts)


def _quota(rule: str, value: float, counts: Tensor) -> Tensor:
    """How many each trajectory may give, [B]."""
    if rule == "top_fraction":
        return (counts.double() * value + 0.5).floor().long().clamp_min(1).minimum(counts)
    return counts.clamp_max(min(value, torch.iinfo(counts.dtype).max)) if rule == "top_k" else counts


def _reach_quantile(found: _Ranking, q: float) -> Tensor:
    """score >= torch.quantile of its trajectory, rounded alike; across an infinite gap the bound is its upper end."""
    if not found.at.numel():
        return torch.zeros_like(found.at, dtype=torch.bool)
    score = found.score.to(torch.promote_types(found.score.dtype, torch.float32))
    last = (found.counts - 1).clamp_min(0)
    place = torch.scalar_tensor(q, dtype=score.dtype, device=score.device) * last
    below = place.long()
    weight = place - below
    lowest = found.starts + last  # beyond the end for an empty trajectory, whose bound is any
    low = score[(lowest - below).clamp_max(score.numel() - 1)]
    high = score[(lowest - place.ceil().long()).clamp_max(score.numel() - 1)]
    between = torch.where((high - low).isfinite(), low.lerp(high, weight), high)
    bound = torch.where(weight == 0, low, between.clamp(low, high))
    return score >= bound[found.row]


def _separated(row: Tensor, at: Tensor, quota: Tensor, separation: int) -> Tensor:
    """Greedily, in the order given: entries at least `separation` from each one taken of their row, at most quota[row]."""
    left = quota.tolist()
    cells: dict[tuple[int, int], int] = {}  # of `separation` columns, so that each holds one entry at most
    for b, entry in zip(*torch.stack([row, at]).tolist(), strict=True):
        if left[b]:
            cell = entry // separation
            near = (cells.get((b, cell + step)) for step in (-1, 0, 1))
            if all(other is None or abs(entry - other) >= separation for other in near):
                cells[b, cell] = entry
                left[b] -= 1
    return torch.tensor(list(cells.values()), dtype=torch.int64, device=at.device)


def _check_value(rule: str, value: object) -> float:
    takes = f"rule={rule!r} takes"
    if rule == "top_k":
        return positive_int("value", value, hint=f"{takes} a count of its own")
    if rule in ("threshold", "mean_plus_std"):
        return real("value", value, hint=f"{takes} a finite number of its own")
    return real("value", value, low=0.0, high=1.0, open_low=rule == "top_fraction", hint=f"{takes} a fraction")


def _check_batch(score: object, mask: object, cu_seqlens: object) -> _Batch:
    checked = floating("score", score)
    if checked.dim() != (2 if cu_seqlens is None else 1):
        rule = "[B, T] without cu_seqlens" if cu_seqlens is None else "[N] with cu_seqlens"
        raise ValueError(f"score must be {rule}, got {list(checked.shape)}; pass cu_seqlens for a packed batch, and only then")
    flat_mask = None if mask is None else per_token("mask", mask, torch.bool, checked.unsqueeze(-1), "score")
    if cu_seqlens is None:
        bounds = torch.arange(checked.shape[0] + 1, device=checked.device) * checked.shape[1]
    else:
        bounds = check_offsets(cu_seqlens, checked, "score")
    _refuse_nan("score", checked, None if flat_mask is None else flat_mask.reshape(checked.shape), "mask it out")
    return _Batch(checked.detach().reshape(-1), flat_mask, bounds)


def _refuse_nan(name: str, value: Tensor, mask: Tensor | None, hint: str) -> None:
    bad = value.isnan() if mask is None else value.isnan() & mask
    if value.device.type == "cpu" and bad.any():
        raise ValueError(f"{name} must not be NaN where it counts, got nan at index {bad.nonzero()[0].tolist()}; {hint}")


def _check_positions(positions: object, score: Tensor, mask: Tensor | None) -> Tensor:
    """The entries [m] of the flat score."""
    checked = on_device("positions", typed("positions", positions, torch.int64), score.device, "score")
    padded = score.dim() == 2
    if checked.shape[1:] != ((2,) if padded else ()) or not checked.dim():
        rule = "[m, 2] (row, column)" if padded else "[m] with cu_seqlens"
        raise ValueError(f"positions must be {rule}, as select_candidates returns them, got {list(checked.shape)}")
    at = checked[:, 0] * score.shape[1] + checked[:, 1] if padded else checked
    if checked.device.type == "cpu":
        outside = (checked < 0) | (checked >= torch.tensor(score.shape))
        _refuse_positions(outside.any(1) if padded else outside, checked, f"lie in score, which is {list(score.shape)}")
        if mask is not None:
            _refuse_positions(~mask[at], checked, "be response tokens, where mask is True")
        ordered, order = at.sort(stable=True)
        repeats = order[1:][ordered[1:] == ordered[:-1]]
        _refuse_positions(torch.zeros_like(at, dtype=torch.bool).index_fill(0, repeats, True), checked, "be distinct")
    return at


def _refuse_positions(bad: Tensor, positions: Tensor, rule: str) -> None:
    if bad.any():
        first = int(bad.nonzero()[0])
        raise ValueError(f"positions must {rule}, got {positions[first].tolist()} (index {first}); pass select_candidates' own")
