"""The chunk loop of linear_logprobs: a matrix product into the tile, then `logprob_rows`."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from topd.ops.linear_logprobs.eager import LogprobRows, LogprobSpec
from topd.ops.linear_logprobs.rows import run_rows
from topd.ops.shared.advise_huge_pages import buffer
from topd.ops.shared.half_range import logprob_scale
from topd.ops.shared.numbers import numbers_in
from topd.ops.shared.one_pass import workspace
from topd.ops.shared.plan import EAGER_LOGPROB_TEMPORARIES, ChunkPlan, plan_chunks
from topd.ops.shared.tiles import HeadGrads, Side, grad_dtype, product_dtype


class Chunk(NamedTuple):
    """One chunk's results: `start` counts the rows before it, `at` is where its rows stand among the N, `hidden` are their
    hidden states."""

    start: int
    at: slice | Tensor
    hidden: Tensor
    rows: LogprobRows


class Call(NamedTuple):
    """The arguments that forward and backward share. `padded`: an id of -1 stands for no token. `dense`: forward sums the
    head's gradients under the hint; without it they wait for backward."""

    side: Side
    mask: Tensor | None
    ids: Tensor
    spec: LogprobSpec
    workspace_bytes: int | None
    backend: str
    padded: bool
    dense: bool
    numbers: Tensor | None

    @classmethod
    def unpack(cls, flat: tuple[Any, ...]) -> "Call":
        return cls(Side(*flat[:6]), flat[6], flat[7], LogprobSpec(*flat[8:11]), *flat[11:16])

    def settled(self) -> "Call":
        """The same with its temperature read from the tensor that holds it inside torch.compile."""
        (temperature,) = numbers_in(self.numbers, self.spec.temperature)
        return self._replace(spec=self.spec._replace(temperature=temperature))

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.side.hidden.dtype, torch.float32)

    @property
    def vocab(self) -> int:
        return self.side.weight.shape[0]

    def head_grads(self, *, weight: bool, bias: bool, adapter: bool) -> HeadGrads:
        return HeadGrads.empty(self.side, self.vocab, self.dtype, self.backend, weight=weight, bias=bias, adapter=adapter)

    def widened(self) -> Side:
        """The side as `run` and the products after it take it."""
        side = self.side.widened(self.vocab, self.dtype, self.backend)
        return side._replace(grad_scale=logprob_scale(side.weight.dtype, self.spec.scale / self.spec.temperature))

    @property
    def narrow(self) -> bool:
        """Whether gradients to the products have 16 bits, in a tile of their own."""
        weight = self.side.weight
        return grad_dtype(weight.dtype, self.dtype, weight.device, self.backend) != self.dtype

    def _plan(self, n: int, tiles: int) -> ChunkPlan:
        weight = self.side.weight
        products = product_dtype(weight.dtype, self.dtype, weight.device, self.backend)
        return plan_chunks(
            n,
            *[self.vocab] * tiles,
            itemsize=self.dtype.itemsize,
            workspace_bytes=workspace(weight.device, self.workspace_bytes, products),
            temporaries=EAGER_LOGPROB_TEMPORARIES if self.backend == "eager" else 0,
        )

    def one_chunk(self) -> bool:
        """Whether all N rows, masked or not, are one chunk of one tile."""
        return self._plan(self.side.hidden.shape[0], 1).chunks <= 1

    def run(
        self, side: Side, chosen: Tensor | None, *, grad: bool, entropy: bool, product_tile: Tensor | None = None
    ) -> Iterator[Chunk]:
        """Each chunk of the chosen rows (None: all) of the widened side; its gradients live in tiles that the next chunk
        overwrites, that to the products in `product_tile` where one at least as large is given."""
        n = side.hidden.shape[0] if chosen is None else chosen.numel()
        second, narrow = grad and entropy, side.weight.dtype if self.narrow else None
        # Tiles of 16 bits are counted in whole float32 ones, two to one.
        tiles = 1 + (second if narrow is None else (second + grad + 1) // 2)
        plan = self._plan(n, tiles)
        shape = (plan.rows, self.vocab)
        tile = buffer(shape, side.weight, self.dtype, self.backend) if product_tile is None else product_tile
        grad_tile = tile.new_empty(shape, dtype=narrow) if grad and narrow else None
        entropy_tile = None
        if second and (self.backend != "eager" or narrow):
            entropy_tile = buffer(shape, side.weight, narrow or self.dtype, self.backend)
        for start, stop in plan.bounds():
            at = slice(start, stop) if chosen is None else chosen[start:stop]
            hidden, product = side.hidden[at], tile[: stop - start]
            side.multiply(hidden, product)
            given = [None if each is None else each[: stop - start] for each in (entropy_tile, grad_tile)]
            operands = (product, side.bias, self.ids[at], self.spec)
            rows = run_rows(self.backend, *operands, entropy_tile=given[0], grad=grad, entropy=entropy, grad_tile=given[1])
            yield Chunk(start, at, hidden, rows)
