"""The chunk loop of linear_divergence: two matrix products into the tiles, then `divergence_rows`."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from topd.ops.linear_divergence.rows import run_rows
from topd.ops.linear_divergence.spec import Call, Rows, RowsInputs
from topd.ops.shared.few_rows import are_few
from topd.ops.shared.loop import TileLoop, plan_rows
from topd.ops.shared.plan import EAGER_TEMPORARIES, ChunkPlan, Products
from topd.ops.shared.split_rows import Piece, SplitRows


class PileGradients(NamedTuple):
    """The gradients to the products of a pile: where its rows stand among the N, the student's hidden states there, dlogits
    [P, V] of the common vocabulary, which rows have a distribution, whether no pile came before, and which ranks have the rows
    where these share them."""

    row_index: slice | Tensor
    hidden: Tensor
    grad_logits: Tensor
    finite: Tensor
    first: bool
    piece: Piece | None


class Chunk(NamedTuple):
    """One chunk's results; `row_index` is where its rows stand among the N. `gradients` come with the last chunk of a pile, and
    live in a tile that is overwritten after it."""

    row_index: slice | Tensor
    rows: Rows
    gradients: PileGradients | None


def plan_of(
    call: Call,
    n: int,
    *,
    full_width: bool = False,
    grad: bool = True,
    weight_grad: bool = True,
    device: torch.device | None = None,
) -> ChunkPlan:
    """Return the plan of n rows.

    Args:
        call: the operands, of which shapes and dtypes count.
        n: rows to compute.
        full_width: tiles are as wide as each side's own vocabulary, as scores need them.
        grad, weight_grad: whether gradients are computed, and whether d weight is one.
        device: where it will run; None: where the operands are.
    """
    student, teacher, engine = call.student, call.teacher, call.backend
    weights, device = (student.weight, teacher.weight), student.weight.device if device is None else device
    widths = [engine.row_width(weight.shape[0] if full_width else call.vocab) for weight in weights]
    own, other = (engine.product_dtype(weight.dtype, call.dtype, device) for weight in weights)
    narrow, products = engine.grad_dtype(student.weight.dtype, call.dtype, device), None
    if grad and narrow != call.dtype:
        hidden_widths = (student.hidden.shape[1], teacher.hidden.shape[1])
        products = Products(*hidden_widths, own.itemsize, other.itemsize, narrow.itemsize, weight_grad)
    return plan_rows(
        n,
        *widths,
        engine=engine,
        device=device,
        multiplied=own,
        workspace_bytes=call.workspace_bytes,
        itemsize=call.dtype.itemsize,
        temporaries=engine.temporaries(EAGER_TEMPORARIES),
        products=products,
        shard=call.shard,
    )


def keeps_dlogits(call: Call, *, scores: bool, device: torch.device | None = None) -> bool:
    """Tell whether forward may keep dlogits for a weight's gradient: rows are few, and all of them, masked or not, are one
    chunk. `device`: as in `plan_of`."""
    if not are_few(call.backend, call.student.hidden):
        return False
    return plan_of(call, call.student.hidden.shape[0], full_width=scores, device=device).chunks <= 1


class Loop:
    """Iterates over the chunks of the chosen rows (None: all).

    Args:
        call: the operands. Where the ranks share the rows `chosen` and `call.tokens` are of the whole sequence.
        grad, scores: what to compute beside the value.
        weight_grad: whether d weight is summed.
        student_tile: where the student's tile shall be, at least as large; None: a new one.
    """

    def __init__(
        self,
        call: Call,
        chosen: Tensor | None,
        *,
        grad: bool,
        weight_grad: bool,
        scores: bool,
        student_tile: Tensor | None = None,
    ) -> None:
        self.call, self.chosen, self.grad, self.scores, self.student_tile = call, chosen, grad, scores, student_tile
        self.vocab = call.vocab
        n = call.student.hidden.shape[0] if chosen is None else chosen.numel()
        self.plan = plan_of(call, n, full_width=scores, grad=grad, weight_grad=weight_grad)
        widths = [side.weight.shape[0] if scores else self.vocab for side in (call.student, call.teacher)]
        sides = [
            side.widened(width, call.dtype, call.backend)
            for side, width in zip((call.student, call.teacher), widths, strict=True)
        ]
        self.student, self.teacher = sides
        self.student = self.student._replace(grad_scale=call.spec.grad_scale(self.student.weight.dtype))

    def __iter__(self) -> Iterator[Chunk]:
        call, finite = self.call, []
        for chunk in self._tiles():
            student_product, teacher_product = chunk.products
            rows = run_rows(
                call.backend,
                RowsInputs(
                    student_product,
                    teacher_product,
                    self.student.bias,
                    self.teacher.bias,
                    None if call.tokens is None else call.tokens[chunk.row_index],
                    call.spec,
                    self.grad,
                    self.scores,
                    chunk.grad_tile,
                    self.student.grad_scale,
                ),
                call.shard,
            )
            finite.append(rows.finite)
            gradients = None
            if rows.grad_logits is not None and (pile := chunk.pile) is not None:
                grad_logits = rows.grad_logits if pile.grad_tile is None else pile.grad_tile
                exists = rows.finite if len(finite) == 1 else torch.cat(finite)
                gradients = PileGradients(
                    pile.row_index, pile.hidden, grad_logits[:, : self.vocab], exists, pile.first, pile.piece
                )
                finite = []
            yield Chunk(chunk.row_index, rows, gradients)

    def _tiles(self) -> TileLoop:
        """Return the loop over tiles of products, with buffers of their own."""
        weight, dtype, engine = self.student.weight, self.call.dtype, self.call.backend
        narrow, shard, chosen = engine.grad_dtype(weight.dtype, dtype, weight.device), self.call.shard, self.chosen
        split_rows = None
        if shard.sequence and chosen is not None:
            split_rows = SplitRows(shard, chosen, self.student.hidden.shape[0])
        return TileLoop(
            engine,
            self.plan,
            (self.student, self.teacher),
            chosen,
            dtype,
            tile=self.student_tile,
            grad_dtype=narrow if self.grad and narrow != dtype else None,
            split_rows=split_rows,
        )
