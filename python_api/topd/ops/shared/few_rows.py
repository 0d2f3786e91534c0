"""Calls of few rows: forward keeps dlogits [N, V] and sums nothing; backward makes the head's gradients by one product, under
the weights that really came.

With N <= H rows dlogits take no more memory than the d weight that forward would sum, and no weights need to be guessed: there
is no hint, nothing to correct and nothing to scale. A call of 32 rows writes V N numbers in place of V H.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from topd.ops.linear_divergence.loop import Call
from topd.ops.linear_logprobs.gradient import Upstream
from topd.ops.linear_logprobs.loop import Call as LogprobCall
from topd.ops.shared.advise_huge_pages import buffer
from topd.ops.shared.one_pass import chosen_rows
from topd.ops.shared.tiles import HeadGrads, Side, product_dtype


def may_keep() -> bool:
    """Return the ops' argument `keep`: whether forward may keep dlogits where rows are few. Not inside torch.compile, where few
    rows and many would need a graph each."""
    return not torch.compiler.is_compiling()


class Kinds(NamedTuple):
    """Which of the head's gradients are asked for."""

    weight: bool
    bias: bool
    adapter: bool


def _are_few(call: Call | LogprobCall, hidden: Tensor) -> bool:
    """Whether dlogits of all rows take no more than d weight. Only the C++ kernels leave them in the product's own tile."""
    n, width = hidden.shape
    return call.backend == "cpp" and 0 < n <= width


def keeps_dlogits(call: Call, *, weight_grad: bool, scores: bool) -> bool:
    """Tell whether linear_divergence keeps dlogits; from shapes and dtypes alone."""
    return weight_grad and _are_few(call, call.student.hidden) and call.one_chunk(full_width=scores)


def keeps_outside_grad(call: LogprobCall, *, weight_grad: bool, entropy: bool) -> bool:
    """Tell whether linear_logprobs keeps the gradient of the mass outside the ids; from shapes and dtypes alone."""
    return weight_grad and not entropy and _are_few(call, call.side.hidden) and call.one_chunk()


def divergence_gradients(call: Call, dlogits: Tensor, finite: Tensor, grad: Tensor, kinds: Kinds) -> HeadGrads:
    """Return the head's gradients under the upstream gradient `grad` [N].

    Args:
        dlogits: [N, V], the chosen rows first.
        finite: [N], 0 for rows without a distribution, whose gradient is NaN unless their `grad` is 0.
        kinds: which gradients.
    """
    rows = _rows(call.mask)
    weights = grad[rows]
    weights = weights.masked_fill((finite[rows] == 0) & (weights != 0), torch.nan)
    dlogits = dlogits[: weights.numel(), : call.vocab]
    return _gradients(call, call.student, dlogits, call.student.hidden[rows], weights, kinds)


def logprob_gradients(call: LogprobCall, outside_grad: Tensor, outside: Tensor, upstream: Upstream, kinds: Kinds) -> HeadGrads:
    """Return the head's gradients: the dense part of each row, and its numbers at the ids, put together in one tile.

    Args:
        outside_grad: [N, V], the chosen rows first.
        outside: [N], NaN for rows without a distribution.
        upstream: what came, by rows.
        kinds: which gradients.
    """
    rows = _rows(call.mask)
    ids, at_ids = call.ids[rows], upstream.at_ids[rows]
    dlogits = outside_grad[: ids.shape[0]] * upstream.dense[rows].unsqueeze(-1)
    dlogits.scatter_add_(-1, ids.clamp(0, call.vocab - 1), at_ids)  # 0 where an id is none
    weights = upstream.used[rows].to(dlogits.dtype)
    weights = weights.masked_fill(outside[rows].isnan() & (weights != 0), torch.nan)
    return _gradients(call, call.side, dlogits, call.side.hidden[rows], weights, kinds)


def _rows(mask: Tensor | None) -> slice | Tensor:
    chosen = chosen_rows(mask)
    return slice(None) if chosen is None else chosen


def _gradients(
    call: Call | LogprobCall, side: Side, dlogits: Tensor, hidden: Tensor, weights: Tensor, kinds: Kinds
) -> HeadGrads:
    narrow = product_dtype(side.weight.dtype, call.dtype, side.weight.device, call.backend) == torch.bfloat16
    grads = HeadGrads.empty(side, call.vocab, call.dtype, call.backend, **kinds._replace(weight=not narrow)._asdict())
    if narrow:
        rounded = buffer((call.vocab, side.weight.shape[1]), side.weight, torch.bfloat16, call.backend)
        grads = grads._replace(weight=rounded)
    if not weights.numel():
        grads.zero()
        return grads
    # The sums read the adapter and the products' dtype alone: the weight itself need not be widened.
    sums = side._replace(weight=side.weight.new_empty(0, side.weight.shape[1])).widened(call.vocab, call.dtype, call.backend)
    grads.add(sums, dlogits, sums.through_adapter(dlogits), hidden, weights, first=True)
    return grads
