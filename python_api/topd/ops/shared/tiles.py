"""The matrix products around a tile: into it, tile = hidden weightᵀ, and out of it, u = dlogits weight and
d weight += dlogitsᵀ (w ⊙ hidden). Tiles of logits, u and the sums are float32.

16-bit operands: on a GPU the products take them as they are, with float32 out, and dlogits and w ⊙ hidden are rounded to them,
dlogits in float16 times a power of two. On a CPU with products of bfloat16 the compiled backend takes that dtype as it is, and
dlogits, in float32, as two bfloat16 parts (`topd.ops.shared.bf16_addmm`). Everywhere else, and on a GPU where torch refuses
such products (`topd.products`), they are widened to float32: hidden states a chunk at a time, weights once a call.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

import topd.ops.shared.bf16_addmm  # noqa: F401  (registers its op)
from topd.backends import multiplies_bf16
from topd.ops.shared.engines import Engine
from topd.ops.shared.scaled_rows import scaled_rows


def mm(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return out = a b, in float32 where a and b have 16 bits."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if out.device.type == "cuda":
        torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)
        return out
    if a.dtype == torch.bfloat16 and multiplies_bf16():
        torch.ops.topd.bf16_addmm(out, _dense(a), b, None, 0.0, 1.0)
        return out
    # The same numbers, for the interpreter.
    return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def _dense(matrix: Tensor) -> Tensor:
    """Return the matrix itself where its rows stand one after the other, as bf16_addmm reads them; else a copy."""
    return matrix if matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1] else matrix.contiguous()


def addmm(out: Tensor, a: Tensor, b: Tensor, *, beta: float = 1.0, alpha: float = 1.0, factors: Tensor | None = None) -> Tensor:
    """Return out = beta out + alpha a b, in float32 where a and b have 16 bits. Where a is float32 and b bfloat16, `factors`
    may multiply the columns of a, and with beta = 0 out may be bfloat16."""
    if a.dtype == b.dtype == out.dtype:
        return out.addmm_(a, b, beta=beta, alpha=alpha)
    if out.device.type == "cuda":
        torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, beta=beta, alpha=alpha, out=out)
    elif a.dtype != b.dtype:
        torch.ops.topd.bf16_addmm(out, a, b, factors, beta, alpha)
    else:  # the same numbers, for the interpreter
        out.addmm_(a.to(out.dtype), b.to(out.dtype), beta=beta, alpha=alpha)
    return out


class Side(NamedTuple):
    """One model's operands: hidden [N, H], weight [V, H], bias [V], a [r, H], b [V, r], and the adapter's scaling."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    a: Tensor | None
    b: Tensor | None
    scaling: float

    def widened(self, vocab: int, dtype: torch.dtype, engine: Engine) -> "WidenedSide":
        """Return the first `vocab` entries of the head as the matrix products take them, for tiles of `dtype`."""
        bias = None if self.bias is None else self.bias[:vocab].to(dtype).contiguous()
        a = None if self.a is None else self.a.to(dtype)
        b = None if self.b is None else self.b[:vocab].to(dtype)
        weight = self.weight[:vocab].to(engine.product_dtype(self.weight.dtype, dtype, self.weight.device))
        if weight.dtype != dtype and weight.device.type == "cpu":
            weight = _dense(weight)
        return WidenedSide(self.hidden, weight, bias, a, b, self.scaling, engine)


class Needs(NamedTuple):
    """Which gradients of a side are asked for."""

    hidden: bool
    weight: bool
    bias: bool
    adapter: bool

    @property
    def head(self) -> bool:
        """Whether a gradient of the head is needed."""
        return self.weight or self.bias or self.adapter

    def of_head_if(self, summed: bool) -> "Needs":
        """Return the same where the head's gradients are summed now; else with none of them."""
        return self if summed else Needs(self.hidden, False, False, False)


class WidenedSide(NamedTuple):
    """A side as the matrix products take it: the weight in the dtype of the products, the small tensors in the tile's dtype;
    the hidden states are left for the chunks. Tiles of dlogits hold `grad_scale` times dlogits, a power of two."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    a: Tensor | None
    b: Tensor | None
    scaling: float
    engine: Engine
    grad_scale: float = 1.0

    def rows(self, index: slice | Tensor) -> Tensor:
        """Return the hidden states of some rows. Where they are in another memory than the weight, these rows alone are copied
        to it; from pinned memory, and without an index, the host does not wait for the copy."""
        if self.hidden.device == self.weight.device:
            return self.hidden[index]
        index = index.to(self.hidden.device) if isinstance(index, Tensor) else index
        return self.hidden[index].to(self.weight.device, non_blocking=True)

    def multiply(self, hidden: Tensor, tile: Tensor) -> None:
        """Fill the tile with hidden weightᵀ + scaling (hidden aᵀ) bᵀ; the rows op adds the bias."""
        mm(tile, hidden.to(self.weight.dtype), self.weight.T)
        if self.a is not None and self.b is not None:
            tile.addmm_(hidden.to(tile.dtype) @ self.a.T, self.b.T, alpha=self.scaling)

    def through_adapter(self, grad_logits: Tensor) -> Tensor | None:
        """Return dlogits b [C, r], which the gradients of both hidden and a need; None without an adapter."""
        if self.b is None:
            return None
        b = self.b[: grad_logits.shape[1]]
        out = b.new_empty(grad_logits.shape[0], b.shape[1])
        return addmm(out, grad_logits, b.to(grad_logits.dtype), beta=0.0, alpha=1 / self.grad_scale)

    def hidden_grad(
        self, grad_logits: Tensor, through_adapter: Tensor | None, finite: Tensor, out: Tensor | None = None
    ) -> Tensor:
        """Return u = d value / d hidden of some rows, in the tile's dtype; NaN where a row has no distribution."""
        if out is None:
            dtype = torch.promote_types(grad_logits.dtype, torch.float32)
            out = grad_logits.new_empty(grad_logits.shape[0], self.weight.shape[1], dtype=dtype)
        u = addmm(out, grad_logits, self.weight[: grad_logits.shape[1]], beta=0.0, alpha=1 / self.grad_scale)
        if through_adapter is not None and self.a is not None:
            u.addmm_(through_adapter, self.a, alpha=self.scaling)
        return u.masked_fill_(~finite.unsqueeze(-1), torch.nan)


class HeadGrads(NamedTuple):
    """Sums over rows of the gradients of the head's tensors, over the common vocabulary, in the tile's dtype; empty where not
    asked for."""

    weight: Tensor
    bias: Tensor
    a: Tensor
    b: Tensor

    @classmethod
    def empty(cls, side: Side, vocab: int, dtype: torch.dtype, engine: Engine, needs: Needs) -> "HeadGrads":
        """Return uninitialised sums for the head of `side`."""
        rank, width = (0 if side.a is None else side.a.shape[0]), side.weight.shape[1]
        sizes = ((vocab, width), (vocab,), (rank, width), (vocab, rank))
        asked = (needs.weight, needs.bias, needs.adapter, needs.adapter)
        return cls(*(engine.buffer(size if ask else (0,), side.weight, dtype) for size, ask in zip(sizes, asked, strict=True)))

    @property
    def wanted(self) -> bool:
        """Whether any of them was asked for."""
        return any(grad.numel() for grad in self)

    def unfilled(self, engine: Engine) -> "HeadGrads":
        """Return fresh tensors of these shapes, uninitialised."""
        return HeadGrads(*(engine.buffer(tuple(grad.shape), grad, grad.dtype) for grad in self))

    def times(self, c: Tensor, engine: Engine, side: Side | None = None) -> "HeadGrads":
        """Return fresh tensors, c times these. Where `side` is given nothing will be added to them, and on a GPU they are what
        `returned` returns: one pass reads the float32 and writes the dtypes of the side's tensors."""
        if side is None or not engine.like_a_gpu(self.weight.device):
            return HeadGrads(*(torch.mul(c, grad, out=out) for grad, out in zip(self, self.unfilled(engine), strict=True)))
        likes = (side.weight, side.bias, side.a, side.b)
        return HeadGrads(*(_scaled(c, total, like, engine) for total, like in zip(self, likes, strict=True)))

    def returned(self, side: Side, needs: Needs) -> "HeadGrads":
        """Return the sums as the gradients of the side's tensors: in their dtypes, with zeros beyond the common vocabulary."""
        likes = (side.weight, side.bias, side.a, side.b)
        wanted = (needs.weight, needs.bias, needs.adapter, needs.adapter)
        return HeadGrads(*(_returned(*each) for each in zip(self, likes, wanted, strict=True)))

    def zero(self) -> None:
        """Fill all with zeros."""
        for grad in self:
            grad.zero_()

    def add(
        self,
        side: WidenedSide,
        grad_logits: Tensor,
        through_adapter: Tensor | None,
        hidden: Tensor,
        row_weights: Tensor,
        *,
        first: bool,
        alpha: float = 1.0,
        normalised: bool = False,
    ) -> None:
        """Add alpha sum_n row_weights[n] d value_n, or start with it. A weight of 0 keeps its row out even where hidden is not
        finite. The weighted hidden states take the dtype of the gradient tile: where that has 16 bits they are rounded. Where
        the products alone have 16 bits, the weights multiply dlogits instead.
        `normalised`: the largest weight is 1 or 0, so that float16 has the range for them."""
        beta = 0.0 if first else 1.0
        weights = row_weights.unsqueeze(-1)
        split = grad_logits.dtype != side.weight.dtype and side.weight.dtype == torch.bfloat16
        if self.weight.numel() and split:
            kept = hidden.masked_fill(weights == 0, 0.0)
            addmm(self.weight, grad_logits.T, kept, beta=beta, alpha=alpha, factors=row_weights)
        weighted = hidden[:, :0]
        if not split or self.a.numel():
            divided = _divided(grad_logits.dtype, normalised)
            dtype = row_weights.dtype if split or divided or self.a.numel() else grad_logits.dtype
            weighted = scaled_rows(side.engine, hidden, row_weights, dtype)

        def summed(out: Tensor, values: Tensor, factor: float = 1.0) -> None:
            narrow, scale = _narrowed(values, grad_logits.dtype, normalised)
            addmm(out, grad_logits.T, narrow, beta=beta, alpha=alpha * factor * scale / side.grad_scale)

        if self.weight.numel() and not split:
            summed(self.weight, weighted)
        if self.bias.numel() and grad_logits.dtype == self.bias.dtype:
            self.bias.addmv_(grad_logits.T, row_weights, beta=beta, alpha=alpha)
        elif self.bias.numel():
            summed(self.bias.unsqueeze(-1), weights)
        if self.a.numel() and side.a is not None and through_adapter is not None:
            self.a.addmm_(through_adapter.T, weighted, alpha=alpha * side.scaling, beta=beta)
            summed(self.b, weighted @ side.a.T, side.scaling)


def _returned(total: Tensor, like: Tensor | None, wanted: bool) -> Tensor:
    if like is None or not wanted or total.shape == like.shape:
        return total if like is None else total.to(like.dtype)
    out = like.new_zeros(like.shape)
    out[: total.shape[0]] = total
    return out


def _scaled(c: Tensor, total: Tensor, like: Tensor | None, engine: Engine) -> Tensor:
    """Return c total, computed in its dtype and rounded once to that of `like`, with zeros beyond the common vocabulary."""
    if like is None or total.numel() == 0:
        return total.clone()
    out = like.new_empty(like.shape)
    out[total.shape[0] :].zero_()
    common = out[: total.shape[0]]
    if engine.scales_rows and total.dim() == 2:
        engine.kernel("scaled_rows", total.device)(common, total, c.expand(total.shape[0]))
    else:
        torch.mul(c, total, out=common)
    return out


def _divided(dtype: torch.dtype, normalised: bool) -> bool:
    """Tell whether values may lie beyond the range of dtype, so that `_narrowed` divides them first."""
    return dtype == torch.float16 and not normalised


def _narrowed(values: Tensor, dtype: torch.dtype, normalised: bool) -> tuple[Tensor, float]:
    """Return values / scale in dtype, and scale: for float16, whose range ends at 2^16 and 2^-24, the power of two of the
    largest. The host waits for it."""
    if not _divided(dtype, normalised) or not values.numel():
        return values.to(dtype), 1.0
    top = float(values.abs().max())
    scale = 2.0 ** math.floor(math.log2(top)) if 0 < top < math.inf else 1.0
    return (values / scale).to(dtype), scale
