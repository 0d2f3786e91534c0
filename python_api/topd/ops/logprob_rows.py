"""topd::logprob_rows, the work between the matrix products of linear_logprobs: a tile of products and ids in,
log-probabilities out.

Read per token: its row of the tile once from memory. Written: the row, which becomes the gradient of the mass outside the ids
where `grad` asks for it; the entropy's gradient into a second tile where `entropy_tile` is given; M log-probabilities and
flags. The math is that of `topd.reference.linear_logprobs`. Compiled backends register it for their device; "eager" calls
the reference itself.
"""

import torch
from torch import Tensor

from topd.reference.linear_logprobs import LogprobRows, LogprobSpec, logprob_rows

torch.library.define(
    "topd::logprob_rows",
    "(Tensor(a!) product, Tensor? bias, Tensor ids, float scale, float? softcap, float temperature, "
    "Tensor(b!)? entropy_tile, bool grad, bool entropy) -> "
    "(Tensor logprobs, Tensor entropy, Tensor outside, Tensor first, Tensor slope, Tensor finite)",
)


@torch.library.register_fake("topd::logprob_rows")
def _fake(product: Tensor, bias: Tensor | None, ids: Tensor, *args: object) -> tuple[Tensor, ...]:
    rows, softcap, entropy = product.shape[0], args[1], args[-1]
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
) -> LogprobRows:
    """One chunk on the named backend. The tile is overwritten; a gradient may live in it, the entropy's in its own."""
    if backend == "eager":
        return logprob_rows(product, bias, ids, spec, grad=grad, entropy=entropy)
    found: list[Tensor] = torch.ops.topd.logprob_rows(product, bias, ids, *spec, entropy_tile, grad, entropy)
    logprobs, entropies, outside, first, slope, finite = found
    gradients = (product if grad else None, entropy_tile)
    return LogprobRows(logprobs, entropies, outside, first, slope, finite, *gradients)
