"""The gradient of linear_logprobs from what its forward pass kept: one number a row for the dense part, M numbers for the
ids."""

from typing import NamedTuple

import torch
from torch import Tensor

from topd.ops.linear_logprobs.ids import factors, onto_first, scalar_of
from topd.ops.linear_logprobs.loop import Loop
from topd.ops.linear_logprobs.spec import Call, Saved, Upstreams
from topd.ops.shared.few_rows import gradients_of_few, kept_rows
from topd.ops.shared.one_pass import Correction, common_factor, correction
from topd.ops.shared.tiles import HeadGrads


def mass(outside: Tensor) -> Tensor:
    """Return q, rounded once, the same in forward and backward."""
    return outside.double().exp().to(outside.dtype)


# Writing a row of d weight anew moves so many times the bytes that one pass saves for a row, about.
ANEW = 6


def in_one_pass(saved: Saved) -> bool:
    """Tell whether c d weight may be written in the weight's 16 bits at once: on a GPU, where the ids stand in so few of its
    rows that these are written anew, and no other gradient is added up in float32."""
    call, grads = saved.call, saved.kept.grads
    few = ANEW * call.ids.numel() <= grads.weight.shape[0]
    narrow = grads.weight.dtype != call.side.weight.dtype and not (grads.bias.numel() or grads.a.numel())
    return few and narrow and call.backend.like_a_gpu(grads.weight.device)


class Upstream(NamedTuple):
    """The factors of each row's gradient, from the three gradients that come in: `dense` [N] of outside_grad, its rounding
    error's scale, `entropy` [N] of entropy_grad or None, `at_ids` [N, M] of the ids' rows of the weight, and `used` [N], rows
    with any."""

    dense: Tensor
    scale: Tensor
    entropy: Tensor | None
    at_ids: Tensor
    used: Tensor


def upstream_of(upstreams: Upstreams, saved: Saved) -> Upstream:
    """Return the factors of each row's gradient."""
    call, logprobs, outside, (first, slope) = saved.call, saved.logprobs, saved.outside, (saved.kept.first, saved.kept.slope)
    g, h, o = upstreams
    g = torch.zeros_like(logprobs, dtype=torch.float64) if g is None else g.double()
    o = torch.zeros_like(outside, dtype=torch.float64) if o is None else o.double()
    used = (g != 0).any(-1) | (o != 0)
    if h is not None:
        used = used | (h != 0)
    if call.mask is not None:
        used = used & call.mask
    unused = ~used.unsqueeze(-1)
    g = onto_first(call.ids, g.masked_fill(unused | ~call.in_range(call.ids), 0.0), first)
    o = o.masked_fill(~used, 0.0)
    total = g.sum(-1)
    p = logprobs.double().exp().masked_fill(~first, 0.0)
    inside, q = p.sum(-1), mass(outside).double()
    at_ids = factors(p, logprobs, g, o, slope if slope.shape[0] else call.spec.scale / call.spec.temperature)
    dtype = logprobs.dtype
    return Upstream(
        (o * inside - total * q).masked_fill(~used, 0.0).to(dtype),
        (g.abs().sum(-1) * q + o.abs() * inside).masked_fill(~used, 0.0).to(dtype),
        None if h is None else h.to(dtype).masked_fill(~used, 0.0),
        at_ids.masked_fill(unused, 0.0).to(dtype),
        used,
    )


def dense_correction(saved: Saved, upstream: Upstream) -> Correction:
    """Return where the sums of D outside_grad + h entropy_grad start from, and the rows that are still to be added."""
    call, kept, q = saved.call, saved.kept, mass(saved.outside)
    dense, uses_entropy = upstream.dense, None if upstream.entropy is None else upstream.entropy != 0
    alive = dense != 0 if uses_entropy is None else (dense != 0) | uses_entropy
    hinted = (kept.hint * q).masked_fill(kept.hint == 0, 0.0) if call.dense else torch.zeros_like(dense)
    c = common_factor(dense, hinted)
    deviates = ~((dense - c * hinted).abs() <= 4 * torch.finfo(dense.dtype).eps * upstream.scale)
    if uses_entropy is not None:
        deviates = deviates | uses_entropy
    if call.mask is not None:  # masked rows obey whatever comes
        deviates = deviates & call.mask
    deviates, alive = call.shard.union(deviates, alive)
    if call.dense:
        no_u = dense.new_empty(0)  # `hinted` holds each row's q, with which its gradient grows
        rows = (c, hinted, dense, deviates, alive)
        narrow = call.grad_dtype != call.dtype
        return correction(
            kept.grads, call.side, no_u, *rows, call.backend, narrow=narrow, complete=in_one_pass(saved), shard=call.shard
        )
    sums = HeadGrads.empty(call.side, call.vocab, call.dtype, call.backend, saved.needs)
    alive_rows = (alive & deviates).nonzero()[:, 0]
    if alive_rows.numel() == 0:
        sums.zero()
    return Correction(sums, alive_rows, [(1.0, dense)], alive_rows.numel() > 0)


def add_rows(saved: Saved, upstream: Upstream, correct: Correction) -> None:
    """Compute the rows of a correction again and add them."""
    if correct.rows.numel() == 0:
        return
    entropy, needs = upstream.entropy, saved.needs
    loop = Loop(saved.call, correct.rows, grad=True, weight_grad=needs.weight, entropy=entropy is not None)
    for chunk in loop:
        if (gradients := chunk.gradients) is None:
            continue
        index, first = gradients.row_index, correct.anew and gradients.first
        parts = [(alpha, weights[index], gradients.outside_grad) for alpha, weights in correct.terms]
        if entropy is not None and gradients.entropy_grad is not None:
            parts.append((1.0, entropy[index], gradients.entropy_grad))
            if not loop.narrow:
                parts = [_together(parts)]
        for alpha, weights, tile in parts:
            weights = weights.masked_fill(~gradients.finite, torch.nan)
            through = loop.side.through_adapter(tile)
            if needs.adapter and through is not None:  # d a is whole on every rank
                through = saved.call.shard.summed(through)
            correct.grads.add(loop.side, tile, through, gradients.hidden, weights, first=first, alpha=alpha)
            first = False


def _together(parts: list[tuple[float, Tensor, Tensor]]) -> tuple[float, Tensor, Tensor]:
    """Return two weighted tiles as one, in the first's place: one product in place of two."""
    (_, weights, tile), (_, entropy, entropy_tile) = parts
    tile.mul_(weights.unsqueeze(-1)).addcmul_(entropy_tile, entropy.unsqueeze(-1))
    return 1.0, torch.ones_like(weights), tile


def in_range_share(call: Call) -> Tensor:
    """Return [N], the share of a row's ids that lie in the vocabulary: where every log-probability has one upstream, the row's
    factor is that times one number."""
    if call.ids.shape[1] == 0:
        return call.ids.new_ones(1, dtype=call.dtype)
    return call.in_range(call.ids).sum(-1).to(call.dtype) / call.ids.shape[1]


def uniform_factor(saved: Saved, upstreams: Upstreams) -> Tensor | None:
    """Return c where every log-probability has one upstream, an expanded scalar as sum() sends it (mean() sends a number each):
    no row deviates and the host need not wait. A row without a distribution (`outside` is NaN) still poisons the sums, as it
    would in eager code."""
    call, outside, scalar = saved.call, saved.outside, scalar_of(upstreams)
    if scalar is None or upstreams.entropy is not None or not saved.uniform_hint or not call.dense or call.mask is not None:
        return None
    c = -scalar.to(outside.dtype) * call.ids.shape[1]
    return torch.where(outside.isnan().any() & (c != 0), torch.nan, c)


def gradients_of_sums(saved: Saved, upstreams: Upstreams, upstream: Upstream) -> tuple[HeadGrads, Tensor | None]:
    """Return the head's dense gradients, the sums that forward made, corrected where rows deviate from the hint, in the tile's
    dtype, and None. Where `in_one_pass` and no row deviates they have the dtypes of the head's tensors; then the second is c,
    what they are of forward's sums."""
    c = uniform_factor(saved, upstreams)
    if c is not None:
        one_pass = in_one_pass(saved)
        grads = saved.kept.grads.times(c, saved.call.backend, saved.call.side if one_pass else None)
        return grads, c if one_pass else None
    correct = dense_correction(saved, upstream)
    add_rows(saved, upstream, correct)
    return correct.grads, correct.c


def gradients_of_kept(saved: Saved, upstream: Upstream) -> HeadGrads:
    """Return the head's gradients of few rows: the dense part of each row, whose tile forward kept with the chosen rows first,
    and its numbers at the ids, put together in one tile. A row whose mass outside is NaN has no distribution."""
    call = saved.call
    rows = kept_rows(call.mask)
    ids, at_ids = call.ids[rows], upstream.at_ids[rows]
    dlogits = saved.kept.outside_grad[: ids.shape[0]] * upstream.dense[rows].unsqueeze(-1)
    dlogits.scatter_add_(-1, ids.clamp(0, call.vocab - 1), at_ids)  # 0 where an id is none
    weights = upstream.used[rows].to(dlogits.dtype)
    weights = weights.masked_fill(saved.outside[rows].isnan() & (weights != 0), torch.nan)
    hidden = call.side.hidden[rows]
    return gradients_of_few(call.side, dlogits, hidden, weights, saved.needs, call.dtype, call.backend)
