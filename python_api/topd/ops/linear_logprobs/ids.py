"""The ids' part of the gradients: M weighted rows of the head for each row of hidden states, and back.

A rank of a sharded head holds some of these rows of the head. What they add to the gradients of the hidden states and of the
adapter's a is a sum over the ranks. The forward pass keeps it, `of_ids`, in a form that backward only has to scale, so that it
sends nothing:

    M = 1      the row of the head itself; its factor is known in backward
    M > 1      the rows' sum where every log-probability has the upstream gradient 1; right for an expanded scalar alone

Any other upstream gradient of several ids needs another sum, and backward makes it.
"""

import torch
from torch import Tensor

from topd.ops.linear_logprobs.spec import Call, LogprobRows, Saved, Upstreams
from topd.ops.shared.few_rows import kept_rows
from topd.ops.shared.repeats import runs_of
from topd.ops.shared.tiles import HeadGrads, Needs
from topd.ops.weighted_gather.op import weighted_gather
from topd.ops.weighted_scatter.op import weighted_scatter


def factors(p: Tensor, logprobs: Tensor, g: Tensor, o: Tensor, slope: Tensor | float) -> Tensor:
    """Return the factor of each id's row of the weight [N, M], in double, from upstream gradients g [N, M], which are at the
    first of equal ids, and o [N]; p [N, M] is 0 beside the first."""
    at_ids = -g * logprobs.double().expm1() - p * ((g.sum(-1) + o).unsqueeze(-1) - g)
    return at_ids * slope


def onto_first(ids: Tensor, g: Tensor, first: Tensor) -> Tensor:
    """Return g [N, M] with the entries of a repeated id added up at its first place, 0 at the others: added up later, in
    float32, they would cancel where the token is nearly certain."""
    if ids.shape[1] < 2 or (ids.device.type == "cpu" and bool(first.all())):
        return g
    runs = runs_of(ids)
    totals = runs.totals(g).gather(-1, runs.run).masked_fill(~runs.starts, 0.0)
    return torch.zeros_like(g).scatter(-1, runs.order, totals)


def scalar_of(upstreams: Upstreams) -> Tensor | None:
    """Return the upstream gradient that every log-probability has, where it is an expanded scalar, as sum() sends it, and the
    mass outside has none; the entropy may have any."""
    g = upstreams.logprobs
    if g is None or upstreams.outside is not None or not g.numel() or any(g.stride()):
        return None
    return g[0, 0]


def width_of_ids(call: Call, needs: Needs) -> int:
    """Return the width of `of_ids`: 0 where there is none, as where no upstream gradient will be a scalar."""
    many = call.ids.shape[1]
    return _width(call, needs) if call.shard.split and (many == 1 or (many and not call.padded)) else 0


def _width(call: Call, needs: Needs) -> int:
    side = call.side
    return needs.hidden * side.hidden.shape[1] + (0 if side.a is None else needs.adapter * side.a.shape[0])


def rows_of_ids(call: Call, rows: LogprobRows, ids: Tensor, needs: Needs) -> Tensor:
    """Return this rank's part of a chunk of `of_ids` [C, H + r] from its ids [C, M]."""
    weights = torch.ones_like(rows.logprobs)
    if ids.shape[1] > 1:
        g = onto_first(ids, call.in_range(ids).double(), rows.first)
        p = rows.logprobs.double().exp().masked_fill(~rows.first, 0.0)
        slope = rows.slope if rows.slope.shape[0] else call.spec.scale / call.spec.temperature
        weights = factors(p, rows.logprobs, g, g.new_zeros(g.shape[0]), slope).to(weights.dtype)
    return _part(call, call.shard.local(ids), weights, needs)


def _part(call: Call, ids: Tensor, weights: Tensor, needs: Needs) -> Tensor:
    """Return what this rank's rows of the head add to the gradients of hidden, and to what goes through the adapter
    [C, H + r], those that are needed."""
    hidden = weights.new_zeros(ids.shape[0], call.side.hidden.shape[1] if needs.hidden else 0)
    through_adapter = _gather(call, ids, weights, hidden)
    return torch.cat([hidden, through_adapter], -1) if needs.adapter and through_adapter is not None else hidden


def _gather(call: Call, ids: Tensor, weights: Tensor, hidden: Tensor) -> Tensor | None:
    """Add the weighted rows to hidden, where it is not empty; return what goes through the adapter [C, r], or None."""
    side, through_adapter = call.side, None
    if side.a is not None and side.b is not None:
        through_adapter = weights.new_zeros(ids.shape[0], side.b.shape[1])
        weighted_gather(call.backend, through_adapter, side.b, ids, weights)
        through_adapter *= side.scaling
    if hidden.numel():
        weighted_gather(call.backend, hidden, side.weight, ids, weights)
        if through_adapter is not None and side.a is not None:
            hidden.addmm_(through_adapter, side.a.to(hidden.dtype))
    return through_adapter


def _gather_over_ranks(saved: Saved, upstreams: Upstreams, at_ids: Tensor, used: Tensor, hidden: Tensor) -> Tensor | None:
    """Do what `_gather` does with the rows of all ranks."""
    call, needs, part = saved.call, saved.needs, saved.kept.of_ids
    (n, many), width = call.ids.shape, _width(call, needs)
    if not (n and many and width):
        return None
    c = scalar_of(upstreams)
    if part.numel() and many == 1:
        part = part * at_ids
    elif part.numel() and c is not None:
        part = part * c.to(part.dtype)
    else:
        rows = kept_rows(call.mask)
        part = at_ids.new_zeros(n, width)
        part[rows] = call.shard.summed(_part(call, call.shard.local(call.ids[rows]), at_ids[rows], needs))
    part = part.masked_fill(~used.unsqueeze(-1), 0.0)
    through_adapter = part[:, hidden.shape[-1] :] if needs.adapter else None
    if needs.hidden:
        hidden += part[:, : hidden.shape[-1]]
    return through_adapter


def _write_rows_anew(call: Call, out: Tensor, total: Tensor, c: Tensor, ids: Tensor, at_ids: Tensor) -> None:
    """Write the rows of out [V, H] that the ids' part adds to, which holds c total in fewer bits: c total and that part, added
    up in total's dtype and rounded once."""
    vocab, width = total.shape
    outside, tokens = (ids < 0) | (ids >= vocab), ids.clamp(0, vocab - 1).flatten()
    runs = runs_of(tokens)
    row_of = torch.zeros_like(tokens).scatter(0, runs.order, runs.run)
    token_of = torch.full_like(tokens, -1).scatter(0, runs.run, runs.ordered)
    rows = total.new_zeros(tokens.numel(), width)
    weighted_gather(call.backend, rows, total, token_of.unsqueeze(-1), c.expand(token_of.numel(), 1))
    weighted_scatter(call.backend, rows, call.side.hidden, row_of.view_as(ids), at_ids.masked_fill(outside, 0.0))
    out.index_put_((tokens,), rows[row_of].to(out.dtype))


def add_ids(
    saved: Saved,
    upstreams: Upstreams,
    at_ids: Tensor,
    used: Tensor,
    grads: HeadGrads,
    hidden: Tensor,
    c: Tensor | None = None,
) -> None:
    """Add the ids' part, with factors at_ids [N, M], to d hidden (where it is not empty) and to the head's gradients; `used`
    [N]: rows with any upstream gradient. `c`: d weight is already in the weight's dtype, c times what forward summed."""
    call = saved.call
    side, ids = call.side, call.shard.local(call.ids)
    if call.shard.split:
        through_adapter = _gather_over_ranks(saved, upstreams, at_ids, used, hidden)
    else:
        through_adapter = _gather(call, ids, at_ids, hidden)
    if grads.weight.numel() and c is not None:
        _write_rows_anew(call, grads.weight, saved.kept.grads.weight, c, ids, at_ids)
    elif grads.weight.numel():
        weighted_scatter(call.backend, grads.weight, side.hidden, ids, at_ids)
    if grads.bias.numel():
        ones = at_ids.new_ones(ids.shape[0], 1)
        weighted_scatter(call.backend, grads.bias.unsqueeze(-1), ones, ids, at_ids)
    if grads.a.numel() and side.a is not None and through_adapter is not None:
        states = side.hidden.to(call.dtype).masked_fill(~used.unsqueeze(-1), 0.0)
        grads.a.addmm_(through_adapter.T, states)
        weighted_scatter(call.backend, grads.b, side.scaling * (states @ side.a.to(call.dtype).T), ids, at_ids)
