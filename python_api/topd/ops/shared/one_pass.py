"""What the one-pass ops share. Forward sums the head's gradients under the weights that the caller will probably use, the hint;
backward finds c with weights = c hint, and makes the sums exact where rows deviate.

A sum over rows is linear in their weights: sums(weights) = c sums(hint) + sums(weights - c hint), and the second part runs over
the rows that deviate alone. Where it would cancel digits, or costs more, the sums start anew.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from topd.ops.shared.engines import Engine
from topd.ops.shared.shard import WHOLE, Shard
from topd.ops.shared.tiles import HeadGrads, Side


def normalised_hint(hint: Tensor | None, mask: Tensor | None, like: Tensor) -> Tensor:
    """Return the hint [N] in the tile's dtype, with largest magnitude 1; 0 where masked or not finite."""
    hint = torch.ones_like(like) if hint is None else hint.to(like.dtype, copy=True)
    hint.masked_fill_(~hint.isfinite(), 0.0)
    if mask is not None:
        hint.masked_fill_(~mask, 0.0)
    if hint.numel():
        top = hint.abs().max()
        hint.div_(torch.where(top > 0, top, torch.ones_like(top)))
    return hint


def common_factor(weights: Tensor, hint: Tensor) -> Tensor:
    """Return c of weights = c hint for most rows: the median of their ratio; 0 where no row has one."""
    ratio = (weights / hint).masked_fill(hint == 0, torch.nan)
    return torch.nanmedian(ratio.masked_fill(~ratio.isfinite(), torch.nan)).nan_to_num(0.0) if ratio.numel() else weights.sum()


class Correction(NamedTuple):
    """The sums so far, fresh tensors; the rows to be added to them; and as what: sum alpha weights[n] d value_n for each
    (alpha, weights [N]). `anew`: the sums are not filled yet. `c`: where they are complete, what they are of those saved."""

    grads: HeadGrads
    rows: Tensor
    terms: list[tuple[float, Tensor]]
    anew: bool
    c: Tensor | None = None


def correction(
    saved: HeadGrads,
    side: Side,
    u: Tensor,
    c: Tensor,
    hinted: Tensor,
    weights: Tensor,
    redo: Tensor,
    alive: Tensor,
    engine: Engine,
    *,
    narrow: bool = False,
    jumps: bool = False,
    complete: bool = False,
    shard: Shard = WHOLE,
) -> Correction:
    """Return what it takes to go from sums under `hinted` to c times them with the rows of `redo` exact.

    Args:
        saved: the sums under the hinted weights; never changed.
        side: the student, for the sizes of its hidden states.
        u: [N, H] gradients to the hidden states, or empty.
        c: the common factor.
        hinted, weights: [N], what each row was summed with, and shall be summed with.
        redo, alive: [N] bool, the rows that deviate from c hinted, and those whose weight counts.
        engine: for the buffers.
        narrow: weighted hidden states were rounded to 16 bits: what is taken away must be what was added, rounded as it was.
        jumps: the gradient to the logits jumps where two numbers are equal. A row computed again among other rows has other
            rounding, may fall on the other side, and could not be taken away: then rows are only ever added.
        complete: where no row deviates, nothing else will be added to the sums (`HeadGrads.times`).
        shard: all ranks decide alike: where one starts anew, all do.
    """
    # The host waits here for a count; on a GPU that costs microseconds, and spares the matrix products of the rows that obey.
    rows = redo.nonzero()[:, 0]
    if rows.numel() == 0:
        return Correction(saved.times(c, engine, side if complete else None), rows, [], False, c if complete else None)
    living = alive.nonzero()[:, 0]
    expected = c * hinted
    anew = rows.numel() >= living.numel()
    if not anew and jumps:
        anew = bool(expected[rows].any())
    elif not anew:
        anew = _cancels(_measures(side, saved, u, shard), expected, weights, rows, living)
    if shard.split:
        (anew_somewhere,) = shard.union(rows.new_full((1,), anew))
        anew = bool(anew_somewhere)
    if anew:
        return Correction(saved.unfilled(engine), living, [(1.0, weights)], True)
    terms = [(-c.item(), hinted), (1.0, weights)] if narrow else [(1.0, weights - expected)]
    return Correction(saved.times(c, engine), rows, terms, False)


def _sizes(side: Side, grads: HeadGrads, *, of_all: bool) -> list[Tensor]:
    """Return for each of the head's gradients a number [N] with which a row's share of it grows: d weight and d a grow with the
    hidden state, d b with what the adapter makes of it, d bias with neither. `of_all`: also of those that are not asked for, as
    a rank of a sharded head that has no tokens cannot tell."""
    sizes = [torch.linalg.vector_norm(side.hidden, dim=-1, dtype=grads.weight.dtype)]
    if grads.bias.numel() or (of_all and side.bias is not None):
        sizes.append(torch.ones_like(sizes[0]))
    if side.a is not None and (of_all or grads.b.numel()):
        dtype = grads.b.dtype
        sizes.append(torch.linalg.vector_norm(side.hidden.to(dtype) @ side.a.to(dtype).T, dim=-1))
    return sizes


def _measures(side: Side, grads: HeadGrads, u: Tensor, shard: Shard) -> list[tuple[Tensor, float]]:
    """Return what each row is measured by [N], its sizes, once more times the norm of its u where there is one, and how many
    times as large as what stays it may be; [R N] where the ranks share the rows."""
    measures = [(size, 4.0) for size in _sizes(side, grads, of_all=shard.sequence)]
    if u.numel():
        steepness = torch.linalg.vector_norm(u, dim=-1)
        measures += [(size * steepness, 64.0) for size, _ in measures]
    sizes = shard.of_all(*(size for size, _ in measures))
    return [(size, limit) for size, (_, limit) in zip(sizes, measures, strict=True)]


def _cancels(measures: list[tuple[Tensor, float]], expected: Tensor, weights: Tensor, redo: Tensor, alive: Tensor) -> bool:
    """Tell whether correcting would subtract rows so much larger than what stays that digits are lost: a hint far off, a row
    with an outlying hidden state, or one with a steep gradient among flat ones. What a row adds is its weight times each of
    its measures; the largest rows are compared, and all of them together."""
    verdicts = []
    for size, limit in measures:
        removed, kept = ((each.abs() * size).nan_to_num_() for each in (expected, weights))
        removed, kept = removed[redo].double(), kept[alive].double()
        verdicts += [removed.max() > limit * kept.max(), removed.sum() > limit * kept.sum()]
    return bool(torch.stack(verdicts).any())
