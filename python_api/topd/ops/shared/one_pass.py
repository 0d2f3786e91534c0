"""What the one-pass ops share. Forward sums the head's gradients under the weights that the caller will probably use, the hint;
backward finds c with weights = c hint, and makes the sums exact where rows deviate.

A sum over rows is linear in their weights: sums(weights) = c sums(hint) + sums(weights - c hint), and the second part runs over
the rows that deviate alone. Where it would cancel digits, or costs more, the sums start anew.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from topd.checks.values import no_second_derivative
from topd.ops.shared.plan import default_workspace
from topd.ops.shared.tiles import HeadGrads, Side


def workspace(device: torch.device, workspace_bytes: int | None, products: torch.dtype) -> int:
    """Bytes for a call's tiles; `products` is the dtype in which they are multiplied."""
    if workspace_bytes is not None:
        return workspace_bytes
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    return default_workspace(device.type, free, bf16_products=products == torch.bfloat16)


def chosen_rows(mask: Tensor | None) -> Tensor | None:
    """Indices of the unmasked rows, None for all. On a GPU this waits for the mask; what it saves are whole rows of matrix
    products."""
    if mask is None:
        return None
    chosen = mask.nonzero()[:, 0]
    return None if chosen.numel() == mask.numel() else chosen


def normalised_hint(hint: Tensor | None, mask: Tensor | None, like: Tensor) -> Tensor:
    """[N] in the tile's dtype, largest magnitude 1; 0 where masked or not finite."""
    hint = torch.ones_like(like) if hint is None else hint.to(like.dtype, copy=True)
    hint.masked_fill_(~hint.isfinite(), 0.0)
    if mask is not None:
        hint.masked_fill_(~mask, 0.0)
    if hint.numel():
        top = hint.abs().max()
        hint.div_(torch.where(top > 0, top, torch.ones_like(top)))
    return hint


def common_factor(weights: Tensor, hint: Tensor) -> Tensor:
    """c of weights = c hint for most rows: the median of their ratio; 0 where no row has one."""
    ratio = (weights / hint).masked_fill(hint == 0, torch.nan)
    return torch.nanmedian(ratio.masked_fill(~ratio.isfinite(), torch.nan)).nan_to_num(0.0) if ratio.numel() else weights.sum()


class Correction(NamedTuple):
    """The sums so far, fresh tensors; the rows to be added to them; and as what: sum alpha weights[n] d value_n for each
    (alpha, weights [N]). `anew`: the sums are not filled yet."""

    grads: HeadGrads
    rows: Tensor
    terms: list[tuple[float, Tensor]]
    anew: bool


def correction(
    saved: HeadGrads,
    side: Side,
    u: Tensor,
    c: Tensor,
    hinted: Tensor,
    weights: Tensor,
    redo: Tensor,
    alive: Tensor,
    backend: str,
    *,
    narrow: bool = False,
    jumps: bool = False,
) -> Correction:
    """What it takes to go from sums under `hinted` to c times them with the rows of `redo` exact.

    Args:
        saved: the sums under the hinted weights; never changed.
        side: the student, for the sizes of its hidden states.
        u: [N, H] gradients to the hidden states, or empty.
        c: the common factor.
        hinted, weights: [N], what each row was summed with, and shall be summed with.
        redo, alive: [N] bool, the rows that deviate from c hinted, and those whose weight counts.
        backend: for the buffers.
        narrow: weighted hidden states were rounded to 16 bits: what is taken away must be what was added, rounded as it was.
        jumps: the gradient to the logits jumps where two numbers are equal. A row computed again among other rows has other
            rounding, may fall on the other side, and could not be taken away: then rows are only ever added.
    """
    # The host waits here for a count; on a GPU that costs microseconds, and spares the matrix products of the rows that obey.
    rows = redo.nonzero()[:, 0]
    if rows.numel() == 0:
        return Correction(saved.times(c, backend), rows, [], False)
    living = alive.nonzero()[:, 0]
    expected = c * hinted
    anew = rows.numel() >= living.numel()
    if not anew and jumps:
        anew = bool(expected[rows].any())
    elif not anew:
        anew = _cancels(_sizes(side, saved), u, expected, weights, rows, living)
    if anew:
        return Correction(saved.unfilled(backend), living, [(1.0, weights)], True)
    terms = [(-c.item(), hinted), (1.0, weights)] if narrow else [(1.0, weights - expected)]
    return Correction(saved.times(c, backend), rows, terms, False)


def _sizes(side: Side, grads: HeadGrads) -> list[Tensor]:
    """For each of the head's gradients, a number [N] with which a row's share of it grows: d weight and d a grow with the
    hidden state, d b with what the adapter makes of it, d bias with neither."""
    sizes = [torch.linalg.vector_norm(side.hidden, dim=-1, dtype=grads.weight.dtype)]
    if grads.bias.numel():
        sizes.append(torch.ones_like(sizes[0]))
    if grads.b.numel() and side.a is not None:
        dtype = grads.b.dtype
        sizes.append(torch.linalg.vector_norm(side.hidden.to(dtype) @ side.a.to(dtype).T, dim=-1))
    return sizes


def _cancels(sizes: list[Tensor], u: Tensor, expected: Tensor, weights: Tensor, redo: Tensor, alive: Tensor) -> bool:
    """Whether correcting would subtract rows so much larger than what stays that digits are lost: a hint far off, a row with
    an outlying hidden state, or one with a steep gradient among flat ones. What a row adds is measured by its weight times its
    size, once more times the norm of its u where there is one; the largest rows are compared, and all of them together."""
    measures = [(size, 4.0) for size in sizes]
    if u.numel():
        steepness = torch.linalg.vector_norm(u, dim=-1)
        measures += [(size * steepness, 64.0) for size in sizes]
    verdicts = []
    for size, limit in measures:
        removed, kept = ((each.abs() * size).nan_to_num_() for each in (expected, weights))
        removed, kept = removed[redo].double(), kept[alive].double()
        verdicts += [removed.max() > limit * kept.max(), removed.sum() > limit * kept.sum()]
    return bool(torch.stack(verdicts).any())


def returned(total: Tensor, like: Tensor | None) -> Tensor:
    """A sum as the gradient of `like`: its dtype, and zeros beyond the common vocabulary."""
    if like is None or total.numel() == 0 or total.shape == like.shape:
        return total if like is None else total.to(like.dtype)
    out = like.new_zeros(like.shape)
    out[: total.shape[0]] = total
    return out


def refuse_inference_tensors(op: str, inputs: Sequence[Any]) -> None:
    """Refuse by name an input that autograd cannot keep for the op's backward. The public functions pass none; torch.compile
    does, which takes its graph's inputs as they are and would fail later without saying which."""
    bad = next((i for i, value in enumerate(inputs) if isinstance(value, Tensor) and value.is_inference()), None)
    if bad is not None:
        name = getattr(torch.ops.topd, op).default._schema.arguments[bad].name
        raise ValueError(
            f"{name} must be no inference tensor in a function under torch.compile, whose backward cannot keep it, got one; "
            "make it under torch.no_grad() instead of torch.inference_mode(), or take the loss out of the compiled function"
        )


def save_call(ctx: Any, inputs: Sequence[Any], count: int, kept: Sequence[Tensor]) -> None:
    """Keep the first `count` inputs and the tensors `kept` for `saved_call`."""
    ctx.tensors_at = [i for i in range(count) if isinstance(inputs[i], Tensor)]
    ctx.others = [None if isinstance(argument, Tensor) else argument for argument in inputs[:count]]
    ctx.save_for_backward(*(inputs[i] for i in ctx.tensors_at), *kept)
    ctx.n_inputs = len(inputs)


def saved_call(ctx: Any) -> tuple[list[Any], tuple[Tensor, ...]]:
    """The inputs and tensors that `save_call` kept."""
    tensors, count = ctx.saved_tensors, len(ctx.tensors_at)
    inputs = list(ctx.others)
    for i, saved in zip(ctx.tensors_at, tensors[:count], strict=True):
        inputs[i] = saved
    return inputs, tensors[count:]


def at_inputs(ctx: Any, grads: Sequence[Tensor] | None) -> tuple[Any, ...]:
    """A backward op's gradients of hidden, weight, bias, a, b (None: there are none) as the gradients of all of the op's
    inputs, which begin with these five."""
    out: list[Any] = [None] * ctx.n_inputs
    hidden, weight, bias, adapter = ctx.needs
    for i, wanted in enumerate((hidden, weight, bias, adapter, adapter) if grads is not None else ()):
        if wanted and grads is not None:
            out[i] = grads[i]
    return tuple(out)


def unfilled_gradients(side: Side, needs: Sequence[bool], like: Tensor) -> tuple[Tensor, ...]:
    """What a backward op returns, uninitialised: gradients of hidden, weight, bias, a, b, empty ones where none is needed."""
    likes = (side.hidden, side.weight, side.bias, side.a, side.b)
    hidden, weight, bias, adapter = needs
    wanted = (hidden, weight, bias, adapter, adapter)
    return tuple(
        each.new_empty(each.shape) if want and each is not None else like.new_empty(0)
        for each, want in zip(likes, wanted, strict=True)
    )


def refuse_second_derivative(op: str) -> None:
    """Without a formula of its own a backward op would have zero second derivatives, with only a warning."""

    def refuse(ctx: Any, *_: Any) -> None:
        raise no_second_derivative(op)

    torch.library.register_autograd(f"topd::{op}_backward", refuse)
