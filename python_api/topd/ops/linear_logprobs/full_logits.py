"""The backend "reference" of linear_logprobs: log-probabilities, entropy and mass outside the ids on full logits [N, V] by
their textbook formulas, their gradients carried on by autograd through a plain matrix product. It shows what the op computes,
at the price of its memory."""

from typing import Any

import torch
from torch import Tensor

from topd.checks.values import in_vocabulary, no_second_derivative
from topd.head import Head
from topd.logits import shape_logits
from topd.ops.linear_logprobs.eager import slope_of
from topd.ops.linear_logprobs.spec import HEAD_VOCABULARY, LogprobSpec
from topd.ops.shared.full_products import head_product


class _Rows(torch.autograd.Function):
    """Log-probabilities, entropy and outside mass of a product [N, V] (bias included) by their textbook formulas."""

    @staticmethod
    def forward(ctx: Any, product: Tensor, ids: Tensor, spec: LogprobSpec) -> tuple[Tensor, Tensor, Tensor]:
        z = shape_logits(product, None, *spec)
        logprobs = z.log_softmax(-1)
        inside = (ids >= 0) & (ids < z.shape[-1])
        index = ids.clamp(0, z.shape[-1] - 1)
        chosen = logprobs.gather(-1, index).masked_fill(~inside, -torch.inf)
        entropy = -(logprobs.exp() * logprobs.masked_fill(logprobs.isneginf(), 0.0)).sum(-1)
        remove = torch.full_like(chosen, torch.inf).masked_fill_(inside, -torch.inf)
        rest = logprobs.scatter_reduce(-1, index, remove, "amin")
        outside = rest.logsumexp(-1)
        ctx.spec = spec
        ctx.save_for_backward(product, ids, entropy, outside, rest.isneginf() & ~logprobs.isneginf())
        return chosen, entropy, outside

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _RowsGradient.apply(*grads, ctx.spec, *ctx.saved_tensors), None, None  # type: ignore[no-untyped-call]


class _RowsGradient(torch.autograd.Function):
    """The backward of `_Rows`; a row without an upstream gradient has none, whatever it holds."""

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, h: Tensor, o: Tensor, spec: LogprobSpec, product: Tensor, ids: Tensor, *rest: Tensor
    ) -> Tensor:
        z, unused = shape_logits(product, None, *spec), ((g == 0).all(-1) & (h == 0) & (o == 0)).unsqueeze(-1)
        entropy, outside, is_chosen = rest
        entropy, outside = entropy.unsqueeze(-1), outside.unsqueeze(-1)
        h, o = h.unsqueeze(-1), o.unsqueeze(-1)
        logprobs = z.log_softmax(-1)
        p = logprobs.exp()
        inside = (ids >= 0) & (ids < z.shape[-1])
        grad = torch.zeros_like(z).scatter_add(-1, ids.clamp(0, z.shape[-1] - 1), g.masked_fill(~inside, 0.0))
        grad = grad - p * (g.masked_fill(~inside, 0.0).sum(-1, keepdim=True) + o)
        share = (logprobs - outside.masked_fill(outside.isneginf(), 0.0)).exp()
        grad = grad + (o * share).masked_fill(is_chosen | (o == 0), 0.0)
        by_entropy = h * p * (logprobs.masked_fill(logprobs.isneginf(), 0.0) + entropy)
        grad = (grad - by_entropy.masked_fill(h == 0, 0.0)) * slope_of(z, spec)
        return grad.masked_fill(unused, 0.0)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise no_second_derivative("linear_logprobs")


def linear_logprobs(
    hidden: Tensor, head: Head, ids: Tensor, mask: Tensor | None, spec: LogprobSpec, *, padded: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return logprobs [N, M], entropy [N] and outside [N] of hidden states [N, H]; the matrix product's gradients are
    autograd's."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    n = hidden.shape[0]
    kept = torch.arange(n, device=hidden.device) if mask is None else mask.nonzero()[:, 0]
    chosen = in_vocabulary("ids", ids[kept], head.weight.shape[0], HEAD_VOCABULARY, low=-1 if padded else 0)
    with torch.autocast(hidden.device.type, enabled=False):
        parts = _Rows.apply(head_product(hidden[kept], head, dtype), chosen, spec)  # type: ignore[no-untyped-call]
    logprobs, entropy, outside = (part.new_zeros(n, *part.shape[1:]).index_put((kept,), part) for part in parts)
    return logprobs, entropy, outside
