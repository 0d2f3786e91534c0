"""Rows that the ranks of a sharded head share, for losses that take all rows on every rank: hidden states are gathered along
the sequence, and each rank gets the results of its own rows.

`topd.linear_divergence` gathers a chunk's rows at a time (`topd.ops.shared.split_rows`). Losses of chosen tokens need the
hidden states of all rows once more in backward, for the gradients of the tokens' rows of the head. So they keep them: R N H
numbers.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from topd.ops.shared.shard import Shard


class SharedRows:
    """The rows of a call: those of this rank, N on all of them, or, where the ranks do not share them, all rows there are.

    Args:
        shard: how the vocabulary of the call's head is split.

    Attributes:
        shard: the same, of calls that have the rows of all ranks.
    """

    def __init__(self, shard: Shard) -> None:
        self._shared = shard if shard.sequence else None
        self.shard = replace(shard, sequence=False) if shard.sequence else shard

    def gathered(self, mine: Tensor) -> Tensor:
        """Return what all ranks have from what this rank has, [N, ...]; differentiable. Every rank must use all of it alike:
        then its gradient is that of its own rows, and nothing is added up."""
        return mine if self._shared is None else _Gathered.apply(mine, self._shared)  # type: ignore[no-untyped-call]

    def own_part(self, value: Tensor, n: int) -> Tensor:
        """Return this rank's n rows of a value that has the rows of all ranks; another value as it is."""
        shared = self._shared
        return value if shared is None or value.shape[0] != n * shared.ranks else value[shared.own(n)]

    def of_all(self, *columns: Tensor | None) -> list[Any]:
        """Return what each argument [N, ...] is for all rows; None stays None."""
        if self._shared is None:
            return list(columns)
        everyone = iter(self._shared.of_all(*(column for column in columns if column is not None)))
        return [None if column is None else next(everyone) for column in columns]

    def own_results(self, n: int, *results: Tensor) -> tuple[Tensor, ...]:
        """Return the results of this rank's n rows from those of all rows; differentiable."""
        return results if self._shared is None else _Own.apply(self._shared, n, *results)  # type: ignore[no-untyped-call]


class _Gathered(torch.autograd.Function):
    """Gathers each rank's rows [N, ...] to [R N, ...]. Backward takes this rank's rows of what comes."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, shard: Shard) -> Tensor:
        ctx.own = shard.own(mine.shape[0])
        return shard.gathered(mine).flatten(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[ctx.own], None


class _Own(torch.autograd.Function):
    """Takes this rank's rows. Backward gathers what comes for the rows of all ranks: one collective for all results. A result
    that no rank uses gets no gradient, so that nothing is computed for it."""

    @staticmethod
    def forward(ctx: Any, shard: Shard, n: int, *results: Tensor) -> tuple[Tensor, ...]:
        own = tuple(result[shard.own(n)].clone() for result in results)
        ctx.shard, ctx.like = shard, [(result.shape, result.dtype, result.device) for result in own]
        ctx.set_materialize_grads(False)
        return own

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [
            torch.zeros(shape, dtype=dtype, device=device) if grad is None else grad
            for grad, (shape, dtype, device) in zip(grads, ctx.like, strict=True)
        ]
        used = torch.tensor([[grad is not None for grad in grads]], device=given[0].device)
        everyone, *whole = ctx.shard.of_all(used, *given)
        return (None, None, *(grad if used else None for grad, used in zip(whole, everyone.any(0).tolist(), strict=True)))
