"""topd::logprob_rows, the work between the matrix products of linear_logprobs: a tile of products and ids in,
log-probabilities out.

Read per token: its row of the tile once from memory. Written: the row, which becomes the gradient of the mass outside the ids
where `grad` asks for it; the entropy's gradient into a second tile; M log-probabilities and flags. On a GPU the gradients may
go into tiles of 16 bits, as the matrix products after them take them. The math is that of `topd.ops.linear_logprobs.eager`.
Compiled backends register the op for their device.
"""

from typing import Any

import torch
from torch import Tensor

from topd.ops.linear_logprobs.eager import rows_in_tiles  # which registers what the backend "eager" runs
from topd.ops.linear_logprobs.spec import ROWS_INPUTS, ROWS_OUTPUTS, Call, LogprobRows, RowsInputs
from topd.ops.shared.op_body import define

define("topd::logprob_rows", f"({ROWS_INPUTS.schema}) -> ({ROWS_OUTPUTS.schema})")


@torch.library.register_fake("topd::logprob_rows")
def _fake(*flat: Any) -> tuple[Tensor, ...]:
    inputs = ROWS_INPUTS.unpack(*flat)
    product, ids = inputs.product, inputs.ids
    rows = product.shape[0]
    return (
        product.new_empty(ids.shape),
        product.new_empty(rows if inputs.entropy else 0),
        product.new_empty(rows),
        product.new_empty(ids.shape, dtype=torch.bool),
        product.new_empty(0 if inputs.spec.softcap is None else rows, ids.shape[1]),
        product.new_empty(rows, dtype=torch.bool),
    )


def run_rows(call: Call, inputs: RowsInputs) -> LogprobRows:
    """Return one chunk's results; the gradients live in the inputs' tiles. Rows of a vocabulary that is split are eager
    torch's on every engine: no compiled kernel stops before its sweep."""
    if call.shard.split:
        return rows_in_tiles(inputs, call.shard, call.tokens)
    kernel = call.backend.kernel("logprob_rows", inputs.product.device)
    logprobs, entropy, outside, first, slope, finite = kernel(*ROWS_INPUTS.pack(inputs))
    tile = inputs.product if inputs.grad_tile is None else inputs.grad_tile
    return LogprobRows(logprobs, entropy, outside, first, slope, finite, tile if inputs.grad else None, inputs.entropy_tile)
