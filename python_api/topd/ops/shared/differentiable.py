"""What the differentiable ops share around torch.library: what they keep for the backward pass, where their gradients go, and
what they refuse."""

from typing import Any, TypeVar

import torch
from torch import Tensor

from topd.checks.values import no_second_derivative
from topd.ops.shared.fields import Table
from topd.ops.shared.tiles import HeadGrads, Needs, Side

R = TypeVar("R", bound=tuple[Any, ...])


def refuse_inference_tensors(tensors: dict[str, Tensor]) -> None:
    """Refuse by name an input that autograd cannot keep for the op's backward. The public functions pass none; torch.compile
    does, which takes its graph's inputs as they are and would fail later without saying which."""
    for name, value in tensors.items():
        if value.is_inference():
            raise ValueError(
                f"{name} must be no inference tensor in a function under torch.compile, whose backward cannot keep it, "
                "got one; make it under torch.no_grad() instead of torch.inference_mode(), or take the loss out of the "
                "compiled function"
            )


def save(ctx: Any, table: Table[R], record: R) -> None:
    """Keep a record for `saved`."""
    tensors, ctx.rest = table.split(record)
    ctx.save_for_backward(*tensors)


def saved(ctx: Any) -> tuple[Any, ...]:
    """Return the flat arguments of the record that `save` kept."""
    return (*ctx.saved_tensors, *ctx.rest)


def input_gradients(table: Table[Any], prefix: str, needs: Needs, gradients: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """Return what autograd takes as the gradients of an op's flat arguments.

    Args:
        table: the op's arguments.
        prefix: what stands before the names of the side that is differentiated.
        needs: which gradients were asked for.
        gradients: of its hidden, weight, bias, a and b.
    """
    wanted = (needs.hidden, needs.weight, needs.bias, needs.adapter, needs.adapter)
    fields = ("hidden", "weight", "bias", "a", "b")
    by_name = {prefix + name: grad for name, grad, want in zip(fields, gradients, wanted, strict=True) if want}
    return tuple(by_name.get(name) for name in table.names)


def unfilled_gradients(side: Side, needs: Needs, dtype: torch.dtype) -> tuple[Tensor, HeadGrads]:
    """Return what a backward op returns, uninitialised: the gradients of hidden and of the head, empty where none is needed.
    `dtype`: of the tiles."""

    def like(value: Tensor | None, wanted: bool) -> Tensor:
        if value is None:
            return side.hidden.new_empty(0, dtype=dtype)
        return value.new_empty(value.shape if wanted else (0,))

    adapter = (like(side.a, needs.adapter), like(side.b, needs.adapter))
    return like(side.hidden, needs.hidden), HeadGrads(like(side.weight, needs.weight), like(side.bias, needs.bias), *adapter)


def refuse_second_derivative(op: str) -> None:
    """Register a gradient that raises: without a formula of its own a backward op would have zero second derivatives, with only
    a warning."""

    def refuse(ctx: Any, *_: Any) -> None:
        raise no_second_derivative(op)

    torch.library.register_autograd(f"topd::{op}_backward", refuse)
