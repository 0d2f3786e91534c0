"""topd::logprob_rows, the work between the matrix products of linear_logprobs: a tile of products and ids in,
log-probabilities out.

Read per token: its row of the tile once from memory. Written: the row, which becomes the gradient of the mass outside the ids
where `grad` asks for it; the entropy's gradient into a second tile where `entropy_tile` is given; M log-probabilities and
flags. On a GPU the gradients may go into tiles of 16 bits, as the matrix products after them take them, in
float16 times `logprob_scale`. The math is that of
`topd.ops.linear_logprobs.eager`. Compiled backends register it for their device; "eager" calls the reference itself.
"""

import torch
from torch import Tensor

from topd.backends import kernel
from topd.ops.linear_logprobs.eager import LogprobRows, LogprobSpec, logprob_rows
from topd.ops.shared.half_range import logprob_scale, scaled_into

torch.library.define(
    "topd::logprob_rows",
    "(Tensor(a!) product, Tensor? bias, Tensor ids, float scale, float? softcap, float temperature, "
    "Tensor(b!)? entropy_tile, bool grad, bool entropy, Tensor(c!)? grad_tile=None, "
    "float grad_scale=1.0) -> "
    "(Tensor logprobs, Tensor entropy, Tensor outside, Tensor first, Tensor slope, Tensor finite)",
)


@torch.library.register_fake("topd::logprob_rows")
def _fake(product: Tensor, bias: Tensor | None, ids: Tensor, *args: object) -> tuple[Tensor, ...]:
    rows, softcap, entropy = product.shape[0], args[1], args[5]
    return (
        product.new_empty(ids.shape),
        product.new_empty(rows if entropy else 0),
        product.new_empty(rows),
        product.new_empty(ids.shape, dtype=torch.bool),
        product.new_empty(0 if softcap is None else rows, ids.shape[1]),
        product.new_empty(rows, dtype=torch.bool),
    )


def run_rows(
    backend: str,
    product: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    spec: LogprobSpec,
    *,
    entropy_tile: Tensor | None,
    grad: bool,
    entropy: bool,
    grad_tile: Tensor | None = None,
) -> LogprobRows:
    """One chunk on the named backend. The tile is overwritten; the gradient is in grad_tile, or may live in it, the entropy's
    in its own."""
    tile = product if grad_tile is None else grad_tile
    scale = logprob_scale(tile.dtype, spec.scale / spec.temperature)
    if backend == "eager":
        rows = logprob_rows(product, bias, ids, spec, grad=grad, entropy=entropy)
        return rows if grad_tile is None else _stored(rows, grad_tile, entropy_tile, scale)
    run = kernel("logprob_rows", backend, product.device)
    found: list[Tensor] = run(product, bias, ids, *spec, entropy_tile, grad, entropy, grad_tile, scale)
    logprobs, entropies, outside, first, slope, finite = found
    gradients = (tile if grad else None, entropy_tile)
    return LogprobRows(logprobs, entropies, outside, first, slope, finite, *gradients)


def _stored(rows: LogprobRows, grad_tile: Tensor, entropy_tile: Tensor | None, scale: float) -> LogprobRows:
    """Gradients in the tiles that were given for them."""
    outside, entropy = rows.outside_grad, rows.entropy_grad
    if outside is not None:
        outside = scaled_into(grad_tile, outside, scale)
    if entropy is not None and entropy_tile is not None:
        entropy = scaled_into(entropy_tile, entropy, scale)
    return rows._replace(outside_grad=outside, entropy_grad=entropy)
