"""The matrix products of the reference, with autograd's gradients for all rows that have an upstream gradient."""

from typing import Any

import torch
from torch import Tensor

from topd.head import Head
from topd.products import exact_products


class _Product(torch.autograd.Function):
    """states weightᵀ. A row whose upstream gradient is 0 has none, and adds none to the weight's, whatever it holds: plain
    autograd would add 0 times NaN."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(states, weight)
        with exact_products(states.device):
            return states @ weight.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,), (states, weight) = grads, ctx.saved_tensors
        unused = (grad == 0).all(-1, keepdim=True)
        with torch.autocast(grad.device.type, enabled=False), exact_products(grad.device):
            return (grad @ weight).masked_fill(unused, 0.0), grad.T @ states.masked_fill(unused, 0.0)


def _product(states: Tensor, weight: Tensor) -> Tensor:
    product: Tensor = _Product.apply(states, weight)  # type: ignore[no-untyped-call]
    return product


def head_product(hidden: Tensor, head: Head, dtype: torch.dtype) -> Tensor:
    """Return hidden weightᵀ + bias + adapter, [N, V] in dtype, of hidden [N, H]; differentiable."""
    hidden = hidden.to(dtype)
    out = _product(hidden, head.weight.to(dtype))
    if head.adapter is not None:
        through = _product(hidden, head.adapter.a.to(dtype))
        out = out + head.adapter.scaling * _product(through, head.adapter.b.to(dtype))
    return out if head.bias is None else out + head.bias.to(dtype)
