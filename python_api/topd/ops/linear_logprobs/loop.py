"""The chunk loop of linear_logprobs: a matrix product into the tile, then `logprob_rows`."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from topd.ops.linear_logprobs.rows import run_rows
from topd.ops.linear_logprobs.spec import Call, LogprobRows, RowsInputs
from topd.ops.shared.few_rows import are_few
from topd.ops.shared.loop import TileLoop, plan_rows
from topd.ops.shared.plan import EAGER_LOGPROB_TEMPORARIES, ChunkPlan


class Chunk(NamedTuple):
    """One chunk's results: `row_index` is where its rows stand among the N, `hidden` are their hidden states; `first`: no chunk
    came before. The gradients live in tiles that are overwritten after it."""

    row_index: slice | Tensor
    hidden: Tensor
    rows: LogprobRows
    first: bool


def plan_of(call: Call, n: int, tiles: int) -> ChunkPlan:
    """Return the plan of n rows with so many tiles."""
    weight, engine = call.side.weight, call.backend
    return plan_rows(
        n,
        *[engine.row_width(call.vocab)] * tiles,
        engine=engine,
        device=weight.device,
        multiplied=engine.product_dtype(weight.dtype, call.dtype, weight.device),
        workspace_bytes=call.workspace_bytes,
        itemsize=call.dtype.itemsize,
        temporaries=engine.temporaries(EAGER_LOGPROB_TEMPORARIES),
    )


def keeps_outside_grad(call: Call) -> bool:
    """Tell whether forward may keep the gradient of the mass outside the ids for a weight's gradient: rows are few, and all of
    them, masked or not, are one chunk of one tile."""
    return are_few(call.backend, call.side.hidden) and plan_of(call, call.side.hidden.shape[0], 1).chunks <= 1


class Loop:
    """Iterates over the chunks of the chosen rows (None: all).

    Args:
        call: the operands.
        grad, entropy: what to compute beside the log-probabilities.
        product_tile: where the products shall be, at least as large; None: a new tile.
    """

    def __init__(
        self, call: Call, chosen: Tensor | None, *, grad: bool, entropy: bool, product_tile: Tensor | None = None
    ) -> None:
        self.call, self.chosen, self.grad, self.entropy, self.product_tile = call, chosen, grad, entropy, product_tile
        side = call.side.widened(call.vocab, call.dtype, call.backend)
        self.side = side._replace(grad_scale=call.spec.grad_scale(side.weight.dtype))
        # Tiles of 16 bits are counted in whole float32 ones, two to one.
        self.narrow = call.grad_dtype != call.dtype
        second = grad and entropy
        tiles = 1 + ((second + grad + 1) // 2 if self.narrow else second)
        self.plan = plan_of(call, call.side.hidden.shape[0] if chosen is None else chosen.numel(), tiles)

    def __iter__(self) -> Iterator[Chunk]:
        call, side = self.call, self.side
        entropy_tile = None
        if self.grad and self.entropy:
            entropy_tile = call.backend.tile(self.plan.rows, call.vocab, side.weight, call.grad_dtype)
        for chunk in self._tiles():
            (product,) = chunk.products
            inputs = RowsInputs(
                product,
                side.bias,
                call.ids[chunk.row_index],
                call.spec,
                None if entropy_tile is None else entropy_tile[: product.shape[0]],
                self.grad,
                self.entropy,
                chunk.grad_tile,
                side.grad_scale,
            )
            yield Chunk(chunk.row_index, chunk.hidden, run_rows(call.backend, inputs), chunk.first)

    def _tiles(self) -> TileLoop:
        """Return the loop over tiles of products, with buffers of their own."""
        grad_dtype = self.call.grad_dtype if self.grad and self.narrow else None
        return TileLoop(
            self.call.backend,
            self.plan,
            (self.side,),
            self.chosen,
            self.call.dtype,
            tile=self.product_tile,
            grad_dtype=grad_dtype,
        )
