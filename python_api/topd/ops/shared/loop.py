"""The chunk loop of every op: rows are cut into chunks, and each chunk's matrix products go into tiles that the next one
overwrites. What happens between the products is the op's own.

A pile is a few chunks whose gradients of 16 bits stand one after the other in a tile of their own and go through the matrix
products together; everywhere else a pile is one chunk.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from topd.ops.shared.engines import ALIGNED_ENTRIES, Engine, row_width
from topd.ops.shared.plan import (
    GPU_SHARE,
    GPU_WORKSPACE_LEAST,
    ChunkPlan,
    Products,
    default_workspace,
    plan_chunks,
    wanted_workspace,
)
from topd.ops.shared.shard import WHOLE, Shard
from topd.ops.shared.split_rows import Piece, SplitRows
from topd.ops.shared.tiles import WidenedSide


def plan_rows(
    n: int,
    *vocabs: int,
    engine: Engine,
    device: torch.device,
    multiplied: torch.dtype,
    workspace_bytes: int | None,
    itemsize: int,
    temporaries: int,
    products: Products | None = None,
    shard: Shard = WHOLE,
) -> ChunkPlan:
    """Return the plan of n rows on a device; `multiplied`: the dtype in which the first side is multiplied, `workspace_bytes`:
    None for the default. The rest is as in `topd.ops.shared.plan.plan_chunks`.

    All ranks of a shard's group get one plan, that of the widest shard in the smallest workspace of the group: with two plans
    one rank would wait for chunks that another does not have.
    """
    tiles: dict[str, Any] = {"itemsize": itemsize, "temporaries": temporaries, "products": products}
    if workspace_bytes is None:
        workspace_bytes = workspace(device, multiplied, wanted_workspace(n, *vocabs, **tiles))
    widths, workspace_bytes = shard.agreed(n, vocabs, workspace_bytes, device)
    return plan_chunks(n, *widths, workspace_bytes=workspace_bytes, block=engine.row_block(device), **tiles)


def workspace(device: torch.device, multiplied: torch.dtype, wanted: int) -> int:
    """Return the default bytes for a call's tiles; `wanted` is what `topd.ops.shared.plan.wanted_workspace` returns."""
    if device.type != "cuda":
        return default_workspace(device.type, bf16_products=multiplied == torch.bfloat16)
    if wanted <= GPU_WORKSPACE_LEAST:  # whatever is available
        return wanted
    return default_workspace(device.type, available_bytes(device, wanted), wanted=wanted)


def available_bytes(device: torch.device, wanted: int) -> int | None:
    """Return the memory of a GPU that torch can still hand out: what the driver calls free, and what torch keeps for reuse;
    None where there is no GPU, as in a plan made elsewhere. Where the first alone leaves room for `wanted`, it is not asked for
    the second.

    In a training loop torch keeps nearly all of the device, so that the driver's figure alone would fall to next to nothing
    after the first step.
    """
    if not torch.cuda.is_available():
        return None
    free, _ = torch.cuda.mem_get_info(device)
    if free >= 2 * GPU_SHARE * wanted:
        return free
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def chosen_rows(mask: Tensor | None) -> Tensor | None:
    """Return the indices of the unmasked rows, None for all. On a GPU this waits for the mask; what it saves are whole rows of
    matrix products."""
    if mask is None:
        return None
    chosen = mask.nonzero()[:, 0]
    return None if chosen.numel() == mask.numel() else chosen


class Pile(NamedTuple):
    """The rows of a pile: where they stand among the N, the first side's hidden states there, their tile of gradients where
    they have one of their own, whether no pile came before, and which ranks have them where these share the rows."""

    row_index: slice | Tensor
    hidden: Tensor
    grad_tile: Tensor | None
    first: bool
    piece: Piece | None = None


class Chunk(NamedTuple):
    """One chunk: where its rows stand among the N, the first side's hidden states there, a tile of products for each side, the
    tile for its gradients where they have one of their own, whether no chunk came before, and, with the last chunk of a pile,
    the pile."""

    row_index: slice | Tensor
    hidden: Tensor
    products: list[Tensor]
    grad_tile: Tensor | None
    first: bool
    pile: Pile | None


class TileLoop:
    """Iterates over the chunks of the chosen rows (None: all).

    Args:
        engine: for the buffers.
        plan: how the rows are cut.
        sides: each gets a tile [rows, V of its weight]; the first is the one that is differentiated.
        dtype: of the tiles.
        tile: where the first side's tile shall be, at least as large; None: a new one.
        grad_dtype: of a tile for gradients of its own; None: there is none.
        split_rows: the chosen rows where the ranks share them; None: each side has all hidden states.
    """

    def __init__(
        self,
        engine: Engine,
        plan: ChunkPlan,
        sides: Sequence[WidenedSide],
        chosen: Tensor | None,
        dtype: torch.dtype,
        *,
        tile: Tensor | None = None,
        grad_dtype: torch.dtype | None = None,
        split_rows: SplitRows | None = None,
    ) -> None:
        self.plan, self.sides, self.split_rows = plan, sides, split_rows
        self.chosen = chosen if split_rows is None else split_rows.rows
        first, *others = sides
        tiles = [self._tile(engine, side, dtype) for side in others]
        self.tiles = [self._tile(engine, first, dtype) if tile is None else tile, *tiles]
        self.grad_tile: Tensor | None = None
        if grad_dtype is not None:
            vocab = first.weight.shape[0]
            shape = plan.pile * plan.rows, row_width(vocab, ALIGNED_ENTRIES)
            self.grad_tile = first.weight.new_empty(shape, dtype=grad_dtype)[:, :vocab]

    def _tile(self, engine: Engine, side: WidenedSide, dtype: torch.dtype) -> Tensor:
        return engine.tile(self.plan.rows, side.weight.shape[0], side.weight, dtype)

    def __iter__(self) -> Iterator[Chunk]:
        differentiated, *others = self.sides
        states = None
        if self.split_rows is not None:
            states = self.split_rows.states([side.hidden for side in self.sides], self.plan.bounds())
        for bounds in self.plan.piles():
            (begin, _), (_, end) = bounds[0], bounds[-1]
            of_pile = []
            for start, stop in bounds:
                index = self._index(start, stop)
                first, *rest = products = [tile[: stop - start] for tile in self.tiles]
                arrived = None if states is None else next(states)
                hidden = differentiated.hidden[index] if arrived is None else arrived.pop(0)
                differentiated.multiply(hidden, first)
                for side, product in zip(others, rest, strict=True):
                    side.multiply(side.hidden[index] if arrived is None else arrived.pop(0), product)
                grad_tile = None if self.grad_tile is None else self.grad_tile[start - begin : stop - begin]
                if arrived is not None:
                    of_pile.append(hidden)
                pile = self._pile(begin, end, hidden if start == begin else None, of_pile) if stop == end else None
                yield Chunk(index, hidden, products, grad_tile, start == 0, pile)

    def _index(self, start: int, stop: int) -> slice | Tensor:
        return slice(start, stop) if self.chosen is None else self.chosen[start:stop]

    def _pile(self, begin: int, end: int, hidden: Tensor | None, arrived: list[Tensor]) -> Pile:
        """Return the pile of these rows; `hidden`: their hidden states, where they are there already; `arrived`: those of its
        chunks, where the ranks share the rows."""
        index, piece = self._index(begin, end), None
        first, *_ = self.sides
        if self.split_rows is not None:
            piece = self.split_rows.piece(begin, end)
            hidden = torch.cat(arrived) if hidden is None else hidden
        grad_tile = None if self.grad_tile is None else self.grad_tile[: end - begin]
        return Pile(index, first.hidden[index] if hidden is None else hidden, grad_tile, begin == 0, piece)
