"""The matrix products around a tile: into it, tile = hidden weightᵀ, and out of it, u = dlogits weight and
d weight += dlogitsᵀ (w ⊙ hidden). float16 and bfloat16 are widened to float32: hidden states a chunk at a time, weights once a
call.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from topd.ops.advise_huge_pages import buffer


class Side(NamedTuple):
    """One model's operands in the order of the ops' arguments: hidden [N, H], weight [V, H], bias [V], a [r, H], b [V, r]."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    a: Tensor | None
    b: Tensor | None
    scaling: float

    def widened(self, vocab: int, dtype: torch.dtype) -> "Side":
        """The first `vocab` entries of the head in dtype; hidden is left for the chunks."""
        bias = None if self.bias is None else self.bias[:vocab].to(dtype).contiguous()
        a = None if self.a is None else self.a.to(dtype)
        b = None if self.b is None else self.b[:vocab].to(dtype)
        return Side(self.hidden, self.weight[:vocab].to(dtype), bias, a, b, self.scaling)

    def multiply(self, hidden: Tensor, tile: Tensor) -> None:
        """tile = hidden weightᵀ + scaling (hidden aᵀ) bᵀ; the rows op adds the bias."""
        torch.mm(hidden, self.weight.T, out=tile)
        if self.a is not None and self.b is not None:
            tile.addmm_(hidden @ self.a.T, self.b.T, alpha=self.scaling)

    def through_adapter(self, grad_logits: Tensor) -> Tensor | None:
        """dlogits b [C, r], which the gradients of both hidden and a need; None without an adapter."""
        return None if self.b is None else grad_logits @ self.b[: grad_logits.shape[1]]

    def hidden_grad(
        self, grad_logits: Tensor, through_adapter: Tensor | None, finite: Tensor, out: Tensor | None = None
    ) -> Tensor:
        """u = d value / d hidden of a chunk; NaN where a row has no distribution."""
        u = torch.mm(grad_logits, self.weight[: grad_logits.shape[1]], out=out)
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
    def empty(
        cls, side: Side, vocab: int, dtype: torch.dtype, backend: str, *, weight: bool, bias: bool, adapter: bool
    ) -> "HeadGrads":
        rank, width = (0 if side.a is None else side.a.shape[0]), side.weight.shape[1]
        shapes = ((vocab, width), weight), ((vocab,), bias), ((rank, width), adapter), ((vocab, rank), adapter)
        return cls(*(buffer(shape if asked else (0,), side.weight, dtype, backend) for shape, asked in shapes))

    @property
    def wanted(self) -> bool:
        return any(grad.numel() for grad in self)

    def unfilled(self, backend: str) -> "HeadGrads":
        """Fresh tensors of these shapes, uninitialised."""
        return HeadGrads(*(buffer(tuple(grad.shape), grad, grad.dtype, backend) for grad in self))

    def times(self, c: Tensor, backend: str) -> "HeadGrads":
        """Fresh tensors, c times these."""
        return HeadGrads(*(torch.mul(c, grad, out=out) for grad, out in zip(self, self.unfilled(backend), strict=True)))

    def zero(self) -> None:
        for grad in self:
            grad.zero_()

    def add(
        self,
        side: Side,
        grad_logits: Tensor,
        through_adapter: Tensor | None,
        hidden: Tensor,
        row_weights: Tensor,
        *,
        first: bool,
    ) -> None:
        """Add sum_n row_weights[n] d value_n, or start with it. A weight of 0 keeps its row out even where hidden is not
        finite."""
        beta = 0 if first else 1
        weights = row_weights.unsqueeze(-1)
        weighted = (hidden * weights).masked_fill_(weights == 0, 0.0)
        if self.weight.numel():
            self.weight.addmm_(grad_logits.T, weighted, beta=beta)
        if self.bias.numel():
            self.bias.addmv_(grad_logits.T, row_weights, beta=beta)
        if self.a.numel() and side.a is not None and through_adapter is not None:
            self.a.addmm_(through_adapter.T, weighted, alpha=side.scaling, beta=beta)
            self.b.addmm_(grad_logits.T, weighted @ side.a.T, alpha=side.scaling, beta=beta)
