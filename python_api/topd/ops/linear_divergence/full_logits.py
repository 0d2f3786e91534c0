"""The backend "reference" of linear_divergence: the rows of `topd.ops.linear_divergence.eager` on full logits [N, V], their
gradients carried on by autograd through two plain matrix products. It shows what the op computes, at the price of its
memory."""

from typing import Any

import torch
from torch import Tensor

from topd.checks.values import in_vocabulary, no_second_derivative
from topd.head import Head
from topd.ops.linear_divergence.eager import divergence_rows
from topd.ops.linear_divergence.spec import COMMON_VOCABULARY, RowSpec
from topd.ops.shared.full_products import head_product
from topd.scores import FIELDS


class _RowsFunction(torch.autograd.Function):
    """`divergence_rows` as a differentiable function of the student's product (bias included)."""

    @staticmethod
    def forward(
        ctx: Any, student_product: Tensor, teacher_product: Tensor, tokens: Tensor | None, spec: RowSpec
    ) -> tuple[Tensor, Tensor]:
        rows = divergence_rows(student_product, teacher_product, None, None, tokens, spec, grad=True, scores=True)
        assert rows.grad_logits is not None
        ctx.save_for_backward(student_product, rows.grad_logits, rows.finite)
        ctx.mark_non_differentiable(rows.scores)
        return rows.value, rows.scores

    @staticmethod
    def backward(ctx: Any, grad_value: Tensor, grad_scores: Tensor) -> Any:
        return _RowsGradient.apply(grad_value, *ctx.saved_tensors), None, None, None  # type: ignore[no-untyped-call]


class _RowsGradient(torch.autograd.Function):
    """The backward of `_RowsFunction`, with the product as an input so that a second derivative is noticed, and refused."""

    @staticmethod
    def forward(ctx: Any, grad_value: Tensor, student_product: Tensor, grad_logits: Tensor, finite: Tensor) -> Tensor:
        upstream = grad_value.unsqueeze(-1)
        grad = grad_logits.masked_fill(~finite.unsqueeze(-1), torch.nan) * upstream
        return grad.masked_fill_(upstream == 0, 0.0)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise no_second_derivative("linear_divergence")


def linear_divergence(
    student_hidden: Tensor,
    student: Head,
    teacher_hidden: Tensor,
    teacher: Head,
    mask: Tensor | None,
    tokens: Tensor | None,
    spec: RowSpec,
) -> tuple[Tensor, Tensor]:
    """Return value [N] and scores [9, N] of hidden states [N, H]; the gradients of the two matrix products are autograd's."""
    dtype = torch.promote_types(torch.promote_types(student_hidden.dtype, teacher_hidden.dtype), torch.float32)
    kept = torch.arange(student_hidden.shape[0], device=student_hidden.device) if mask is None else mask.nonzero()[:, 0]
    if tokens is not None:
        vocab = min(student.weight.shape[0], teacher.weight.shape[0])
        tokens = in_vocabulary("tokens", tokens[kept], vocab, COMMON_VOCABULARY)
    with torch.autocast(student_hidden.device.type, enabled=False):
        products = [
            head_product(hidden[kept], head, dtype) for hidden, head in ((student_hidden, student), (teacher_hidden, teacher))
        ]
        value, scores = _RowsFunction.apply(*products, tokens, spec)  # type: ignore[no-untyped-call]
    n = student_hidden.shape[0]
    return value.new_zeros(n).index_put((kept,), value), scores.new_zeros(len(FIELDS), n).index_copy(1, kept, scores)
