"""topd::divergence_rows, the work between the matrix products: two tiles of products in, divergences out.

Read per token: both tiles' rows once from memory. Written: the student's row, which becomes the gradient to the product,
where `grad` asks for it (the teacher's row is scratch), a value, a flag, nine scores. On a GPU the gradient may go into a tile
of 16 bits instead, as the matrix products after it take it. The math is that of `topd.ops.linear_divergence.eager`. Compiled
backends register the op for their device.
"""

from typing import Any

import torch
from torch import Tensor

from topd.ops.linear_divergence.eager import rows_in_tiles  # which registers what the backend "eager" runs
from topd.ops.linear_divergence.spec import ROWS_INPUTS, ROWS_OUTPUTS, Rows, RowsInputs
from topd.ops.shared.engines import Engine
from topd.ops.shared.op_body import define
from topd.ops.shared.shard import Shard
from topd.scores import FIELDS

define("topd::divergence_rows", f"({ROWS_INPUTS.schema}) -> ({ROWS_OUTPUTS.schema})")


@torch.library.register_fake("topd::divergence_rows")
def _fake(*flat: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs = ROWS_INPUTS.unpack(*flat)
    product = inputs.student_product
    rows = product.shape[0]
    return (
        product.new_empty(rows),
        product.new_empty(len(FIELDS) if inputs.scores else 0, rows),
        product.new_empty(rows, dtype=torch.bool),
    )


def run_rows(engine: Engine, inputs: RowsInputs, shard: Shard) -> Rows:
    """Return one chunk's results; the gradient lives in one of the inputs' tiles. Rows of a vocabulary that is split are eager
    torch's on every engine: no compiled kernel stops between its two sweeps."""
    if shard.split:
        return rows_in_tiles(inputs, shard)
    kernel = engine.kernel("divergence_rows", inputs.student_product.device)
    value, scores, finite = kernel(*ROWS_INPUTS.pack(inputs))
    tile = inputs.student_product if inputs.grad_tile is None else inputs.grad_tile
    return Rows(value, scores, finite, tile if inputs.grad else None)
