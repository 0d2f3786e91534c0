"""linear_divergence of few rows: forward keeps dlogits [N, V] and sums nothing; backward makes the head's gradients by one
product, under the weights that really came.

With N <= H rows dlogits take no more memory than the d weight that forward would sum, and no weights need to be guessed: there
is no hint, nothing to correct and nothing to scale. A call of 32 rows writes V N numbers in place of V H.
"""

import torch
from torch import Tensor

from topd.ops.divergence_chunks import Call
from topd.ops.one_pass import chosen_rows
from topd.ops.tiles import HeadGrads, product_dtype


def keeps_dlogits(call: Call, *, weight_grad: bool, scores: bool) -> bool:
    """Whether forward keeps dlogits; from shapes and dtypes alone. Only the C++ kernels leave them in the student's tile."""
    n, width = call.student.hidden.shape
    return weight_grad and call.backend == "cpp" and 0 < n <= width and call.one_chunk(full_width=scores)


def kept_gradients(
    call: Call, dlogits: Tensor, finite: Tensor, grad: Tensor, *, weight: bool, bias: bool, adapter: bool
) -> HeadGrads:
    """The head's gradients under the upstream gradient `grad` [N].

    Args:
        dlogits: [N, V], the chosen rows first.
        finite: [N], 0 for rows without a distribution, whose gradient is NaN unless their `grad` is 0.
    """
    side = call.student
    chosen = chosen_rows(call.mask)
    rows = slice(None) if chosen is None else chosen
    hidden, weights = side.hidden[rows], grad[rows]
    weights = weights.masked_fill((finite[rows] == 0) & (weights != 0), torch.nan)
    products = product_dtype(side.weight.dtype, call.dtype, side.weight.device, call.backend)
    kinds = {"weight": weight, "bias": bias, "adapter": adapter}
    grads = HeadGrads.empty(side, call.vocab, call.dtype, call.backend, **kinds)
    if products == torch.bfloat16:
        grads = grads._replace(weight=side.weight.new_empty(call.vocab, side.weight.shape[1]))
    if not weights.numel():
        grads.zero()
        return grads
    # The sums read the adapter and the products' dtype alone: the weight itself need not be widened.
    sums = side._replace(weight=side.weight.new_empty(0, side.weight.shape[1])).widened(call.vocab, call.dtype, call.backend)
    dlogits = dlogits[: weights.numel(), : call.vocab]
    grads.add(sums, dlogits, sums.through_adapter(dlogits), hidden, weights, first=True)
    return grads
