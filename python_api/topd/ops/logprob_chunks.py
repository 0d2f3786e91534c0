"""The chunk loop of linear_logprobs: a matrix product into the tile, then `logprob_rows`."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from topd.ops.advise_huge_pages import buffer
from topd.ops.logprob_rows import run_rows
from topd.ops.one_pass import workspace
from topd.ops.tiles import HeadGrads, Side
from topd.plan import EAGER_LOGPROB_TEMPORARIES, plan_chunks
from topd.reference.linear_logprobs import LogprobRows, LogprobSpec


class Chunk(NamedTuple):
    """One chunk's results: `start` counts the rows before it, `at` is where its rows stand among the N, `hidden` holds them in
    the tile's dtype."""

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

    @classmethod
    def unpack(cls, flat: tuple[Any, ...]) -> "Call":
        return cls(Side(*flat[:6]), flat[6], flat[7], LogprobSpec(*flat[8:11]), *flat[11:15])

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.side.hidden.dtype, torch.float32)

    @property
    def vocab(self) -> int:
        return self.side.weight.shape[0]

    def head_grads(self, *, weight: bool, bias: bool, adapter: bool) -> HeadGrads:
        return HeadGrads.empty(self.side, self.vocab, self.dtype, self.backend, weight=weight, bias=bias, adapter=adapter)

    def run(self, side: Side, chosen: Tensor | None, *, grad: bool, entropy: bool) -> Iterator[Chunk]:
        """Each chunk of the chosen rows (None: all) of the widened side; its gradients live in tiles that the next chunk
        overwrites."""
        n, device = side.hidden.shape[0] if chosen is None else chosen.numel(), side.hidden.device
        tiles = 2 if grad and entropy else 1
        plan = plan_chunks(
            n,
            *[self.vocab] * tiles,
            itemsize=self.dtype.itemsize,
            workspace_bytes=workspace(device, self.workspace_bytes),
            temporaries=EAGER_LOGPROB_TEMPORARIES if self.backend == "eager" else 0,
        )
        shape = (plan.rows, self.vocab)
        tile = buffer(shape, side.weight, self.dtype, self.backend)
        second = buffer(shape, side.weight, self.dtype, self.backend) if tiles == 2 and self.backend != "eager" else None
        for start, stop in plan.bounds():
            at = slice(start, stop) if chosen is None else chosen[start:stop]
            hidden, product = side.hidden[at].to(self.dtype), tile[: stop - start]
            side.multiply(hidden, product)
            entropy_tile = None if second is None else second[: stop - start]
            operands = (product, side.bias, self.ids[at], self.spec)
            rows = run_rows(self.backend, *operands, entropy_tile=entropy_tile, grad=grad, entropy=entropy)
            yield Chunk(start, at, hidden, rows)
