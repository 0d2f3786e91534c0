"""The chunk loop of linear_logprobs: a matrix product into the tile, then `logprob_rows`."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from topd.ops.linear_logprobs.rows import run_rows
from topd.ops.linear_logprobs.spec import Call, LogprobRows, RowsInputs
from topd.ops.shared.few_rows import are_few
from topd.ops.shared.loop import TileLoop, plan_rows
from topd.ops.shared.plan import EAGER_LOGPROB_TEMPORARIES, ChunkPlan, Products


class PileGradients(NamedTuple):
    """The gradients to the products of a pile: where its rows stand among the N, their hidden states, both gradients [P, V]
    (that of the entropy or None), which rows have a distribution, and whether no pile came before."""

    row_index: slice | Tensor
    hidden: Tensor
    outside_grad: Tensor
    entropy_grad: Tensor | None
    finite: Tensor
    first: bool


class Chunk(NamedTuple):
    """One chunk's results; `row_index` is where its rows stand among the N. `gradients` come with the last chunk of a pile, and
    live in tiles that are overwritten after it."""

    row_index: slice | Tensor
    rows: LogprobRows
    gradients: PileGradients | None


def plan_of(call: Call, n: int, *, grad: bool, weight_grad: bool, entropy: bool) -> ChunkPlan:
    """Return the plan of n rows. `grad`, `weight_grad`: whether gradients are computed, and whether d weight is one."""
    weight, engine = call.side.weight, call.backend
    multiplied = engine.product_dtype(weight.dtype, call.dtype, weight.device)
    narrow, tiles = call.grad_dtype != call.dtype, 1 + (grad and entropy)
    products = None
    if grad and narrow:
        products = Products(weight.shape[1], 0, multiplied.itemsize, 0, call.grad_dtype.itemsize * tiles, weight_grad)
    return plan_rows(
        n,
        *[engine.row_width(call.vocab)] * (1 if narrow else tiles),
        engine=engine,
        device=weight.device,
        multiplied=multiplied,
        workspace_bytes=call.workspace_bytes,
        itemsize=call.dtype.itemsize,
        temporaries=engine.temporaries(EAGER_LOGPROB_TEMPORARIES),
        products=products,
        shard=call.shard,
    )


def keeps_outside_grad(call: Call) -> bool:
    """Tell whether forward may keep the gradient of the mass outside the ids for a weight's gradient: rows are few, and all of
    them, masked or not, are one chunk of one tile."""
    if not are_few(call.backend, call.side.hidden):
        return False
    return plan_of(call, call.side.hidden.shape[0], grad=True, weight_grad=True, entropy=False).chunks <= 1


class Loop:
    """Iterates over the chunks of the chosen rows (None: all).

    Args:
        call: the operands.
        grad, entropy: what to compute beside the log-probabilities.
        weight_grad: whether d weight is summed.
        product_tile: where the products shall be, at least as large; None: a new tile.
    """

    def __init__(
        self,
        call: Call,
        chosen: Tensor | None,
        *,
        grad: bool,
        weight_grad: bool,
        entropy: bool,
        product_tile: Tensor | None = None,
    ) -> None:
        self.call, self.chosen, self.grad, self.entropy, self.product_tile = call, chosen, grad, entropy, product_tile
        side = call.side.widened(call.vocab, call.dtype, call.backend)
        self.side = side._replace(grad_scale=call.spec.grad_scale(side.weight.dtype))
        self.narrow = call.grad_dtype != call.dtype
        n = call.side.hidden.shape[0] if chosen is None else chosen.numel()
        self.plan = plan_of(call, n, grad=grad, weight_grad=weight_grad, entropy=entropy)

    def __iter__(self) -> Iterator[Chunk]:
        call, side, held = self.call, self.side, 0
        entropy_tile, finite = None, []
        if self.grad and self.entropy:
            rows_held = self.plan.pile * self.plan.rows
            entropy_tile = call.backend.tile(rows_held, call.vocab, side.weight, call.grad_dtype)
        for chunk in self._tiles():
            (product,) = chunk.products
            begin, held = held, held + product.shape[0]
            inputs = RowsInputs(
                product,
                side.bias,
                call.ids[chunk.row_index],
                call.spec,
                None if entropy_tile is None else entropy_tile[begin:held],
                self.grad,
                self.entropy,
                chunk.grad_tile,
                side.grad_scale,
            )
            rows = run_rows(call, inputs)
            finite.append(rows.finite)
            gradients = None
            if (pile := chunk.pile) is not None:
                outside_grad = rows.outside_grad if pile.grad_tile is None else pile.grad_tile
                entropy_grad = None if entropy_tile is None else entropy_tile[:held]
                exists = rows.finite if len(finite) == 1 else torch.cat(finite)
                if outside_grad is not None:
                    gradients = PileGradients(pile.row_index, pile.hidden, outside_grad, entropy_grad, exists, pile.first)
                finite, held = [], 0
            yield Chunk(chunk.row_index, rows, gradients)

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
