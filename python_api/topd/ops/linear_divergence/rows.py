"""topd::divergence_rows, the work between the matrix products: two tiles of products in, divergences out.

Read per token: both tiles' rows once from memory. Written: the student's row, which becomes the gradient to the product,
where `grad` asks for it (the teacher's row is scratch), a value, a flag, nine scores. On a GPU the gradient may go into a tile
of 16 bits instead, as the matrix products after it take it, in float16 times `divergence_scale`. The math is that of
`topd.ops.linear_divergence.eager`. Compiled backends register it for their device; "eager" calls the reference itself.
"""

import torch
from torch import Tensor

from topd.backends import kernel
from topd.ops.linear_divergence.eager import Rows, RowSpec, divergence_rows
from topd.ops.shared.half_range import divergence_scale, scaled_into
from topd.scores import FIELDS

torch.library.define(
    "topd::divergence_rows",
    "(Tensor(a!) student_product, Tensor(b!) teacher_product, Tensor? student_bias, Tensor? teacher_bias, Tensor? tokens, "
    "float student_scale, float? student_softcap, float teacher_scale, float? teacher_softcap, float temperature, "
    "str divergence, float parameter, float hard_weight, bool grad, bool scores, Tensor(c!)? grad_tile=None, "
    "float grad_scale=1.0) -> "
    "(Tensor value, Tensor scores, Tensor finite)",
)


@torch.library.register_fake("topd::divergence_rows")
def _fake(student_product: Tensor, *args: object) -> tuple[Tensor, Tensor, Tensor]:
    rows, scores = student_product.shape[0], args[13]
    return (
        student_product.new_empty(rows),
        student_product.new_empty(len(FIELDS) if scores else 0, rows),
        student_product.new_empty(rows, dtype=torch.bool),
    )


def run_rows(
    backend: str,
    student_product: Tensor,
    teacher_product: Tensor,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    tokens: Tensor | None,
    spec: RowSpec,
    *,
    grad: bool,
    scores: bool,
    grad_tile: Tensor | None = None,
) -> Rows:
    """One chunk on the named backend. The tiles are overwritten; the gradient is in grad_tile, or may live in the student's."""
    operands = (student_product, teacher_product, student_bias, teacher_bias, tokens)
    tile = student_product if grad_tile is None else grad_tile
    scale = divergence_scale(tile.dtype, spec.divergence, spec.hard_weight, spec.student_scale / spec.temperature)
    if backend == "eager":
        rows = divergence_rows(*operands, spec, grad=grad, scores=scores)
        if grad_tile is None or rows.grad_logits is None:
            return rows
        return rows._replace(grad_logits=scaled_into(grad_tile, rows.grad_logits, scale))
    run = kernel("divergence_rows", backend, student_product.device)
    value, found, finite = run(*operands, *spec, grad, scores, grad_tile, scale)
    return Rows(value, found, finite, tile if grad else None)
