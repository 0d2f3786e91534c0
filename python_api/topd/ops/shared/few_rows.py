"""Calls of few rows: forward keeps dlogits [N, V] and sums nothing; backward makes the head's gradients by one product, under
the weights that really came.

With N <= H rows dlogits take no more memory than the d weight that forward would sum, and no weights need to be guessed: there
is no hint, nothing to correct and nothing to scale. A call of 32 rows writes V N numbers in place of V H.
"""

import torch
from torch import Tensor

from topd.ops.shared.engines import Engine
from topd.ops.shared.loop import chosen_rows
from topd.ops.shared.tiles import HeadGrads, Needs, Side


def may_keep() -> bool:
    """Return the ops' argument `keep`: whether forward may keep dlogits where rows are few. Not inside torch.compile, where few
    rows and many would need a graph each."""
    return not torch.compiler.is_compiling()


def are_few(engine: Engine, hidden: Tensor) -> bool:
    """Tell whether dlogits of all rows take no more than d weight, and the engine can keep them."""
    n, width = hidden.shape
    return engine.keeps_few_rows and 0 < n <= width


def kept_rows(mask: Tensor | None) -> slice | Tensor:
    """Return where the chosen rows, which stand first in what was kept, stand among the N."""
    chosen = chosen_rows(mask)
    return slice(None) if chosen is None else chosen


def gradients_of_few(
    side: Side, dlogits: Tensor, hidden: Tensor, weights: Tensor, needs: Needs, dtype: torch.dtype, engine: Engine
) -> HeadGrads:
    """Return the head's gradients: sums over the rows of weights [C] times dlogits [C, V] and hidden [C, H]."""
    vocab, (_, width) = dlogits.shape[1], side.weight.shape
    narrow = engine.product_dtype(side.weight.dtype, dtype, side.weight.device) == torch.bfloat16
    grads = HeadGrads.empty(side, vocab, dtype, engine, needs._replace(weight=needs.weight and not narrow))
    if narrow:
        grads = grads._replace(weight=engine.buffer((vocab, width), side.weight, torch.bfloat16))
    if not weights.numel():
        grads.zero()
        return grads
    # The sums read the adapter and the products' dtype alone: the weight itself need not be widened.
    sums = side._replace(weight=side.weight.new_empty(0, width)).widened(vocab, dtype, engine)
    grads.add(sums, dlogits, sums.through_adapter(dlogits), hidden, weights, first=True)
    return grads
