"""The chunk loop of linear_divergence: two matrix products into the tiles, then `divergence_rows`."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from topd.backends import kernel
from topd.ops.linear_divergence.eager import Rows, RowSpec
from topd.ops.linear_divergence.rows import run_rows
from topd.ops.score_tokens.op import run_scores, serves
from topd.ops.shared.advise_huge_pages import buffer
from topd.ops.shared.half_range import divergence_scale
from topd.ops.shared.numbers import numbers_in
from topd.ops.shared.one_pass import workspace
from topd.ops.shared.plan import EAGER_TEMPORARIES, ChunkPlan, Products, plan_chunks
from topd.ops.shared.tiles import Side, grad_dtype, product_dtype

# Divergences with their parameters that are scores themselves.
FUSED_VALUES = (("forward_kl", float("inf")), ("reverse_kl", 0.0))


class Gradients(NamedTuple):
    """The gradients to the products of one or more chunks: where their rows stand among the N, the student's hidden states
    there, dlogits [P, V], which rows have a distribution; `first`: none came before."""

    at: slice | Tensor
    hidden: Tensor
    grad_logits: Tensor
    finite: Tensor
    first: bool


class Chunk(NamedTuple):
    """One chunk's results; `at` is where its rows stand among the N. `gradients` come with the last chunk of a pile, and live
    in a tile that is overwritten after it."""

    at: slice | Tensor
    rows: Rows
    gradients: Gradients | None


class TileLoop:
    """Iterates over chunks of the chosen rows; the tiles are allocated once and reused. Per chunk: two matrix products into the
    tiles, then `divergence_rows`."""

    def __init__(
        self,
        student: Side,
        teacher: Side,
        tokens: Tensor | None,
        spec: RowSpec,
        plan: ChunkPlan,
        backend: str,
        *,
        chosen: Tensor | None,
        dtype: torch.dtype,
        widths: tuple[int, int],
    ) -> None:
        self.vocab = min(widths)
        self.student = student.widened(widths[0], dtype, backend)
        slope = spec.student_scale / spec.temperature
        scale = divergence_scale(self.student.weight.dtype, spec.divergence, spec.hard_weight, slope)
        self.student = self.student._replace(grad_scale=scale)
        self.teacher = teacher.widened(widths[1], dtype, backend)
        self.tokens, self.spec, self.chosen = tokens, spec, chosen
        self.plan, self.backend, self.dtype = plan, backend, dtype

    def run(self, *, grad: bool, scores: bool, student_tile: Tensor | None = None) -> Iterator[Chunk]:
        """Each chunk's results. `student_tile`: where the student's tile shall be, at least as large."""
        tiles = [
            buffer((self.plan.rows, side.weight.shape[0]), side.weight, self.dtype, self.backend) if tile is None else tile
            for side, tile in ((self.student, student_tile), (self.teacher, None))
        ]
        weight = self.student.weight
        narrow = grad_dtype(weight.dtype, self.dtype, weight.device, self.backend)
        piled = None
        if grad and narrow != self.dtype:
            width = -(-tiles[0].shape[1] // 8) * 8  # each row begins on 16 bytes, as its stores and products like it
            piled = tiles[0].new_empty(self.plan.pile * self.plan.rows, width, dtype=narrow)[:, : tiles[0].shape[1]]
        for pile in self.plan.piles():
            begin, finite = pile[0][0], []
            for start, stop in pile:
                grad_tile = None if piled is None else piled[start - begin : stop - begin]
                at, rows = self._rows(start, stop, tiles, grad_tile, grad=grad, scores=scores)
                finite.append(rows.finite)
                gradients = None
                if rows.grad_logits is not None and stop == pile[-1][1]:
                    made = rows.grad_logits if piled is None else piled[: stop - begin]
                    where = self._at(begin, stop)
                    exists = finite[0] if len(finite) == 1 else torch.cat(finite)
                    gradients = Gradients(where, self.student.hidden[where], made[:, : self.vocab], exists, begin == 0)
                yield Chunk(at, rows, gradients)

    def _at(self, start: int, stop: int) -> slice | Tensor:
        return slice(start, stop) if self.chosen is None else self.chosen[start:stop]

    def _rows(
        self, start: int, stop: int, tiles: list[Tensor], grad_tile: Tensor | None, *, grad: bool, scores: bool
    ) -> tuple[slice | Tensor, Rows]:
        at = self._at(start, stop)
        student_product, teacher_product = (tile[: stop - start] for tile in tiles)
        self.student.multiply(self.student.hidden[at], student_product)
        self.teacher.multiply(self.teacher.hidden[at], teacher_product)
        tokens = None if self.tokens is None else self.tokens[at]
        operands = (student_product, teacher_product, self.student.bias, self.teacher.bias, tokens)
        return at, run_rows(self.backend, *operands, self.spec, grad=grad, scores=scores, grad_tile=grad_tile)


class Call(NamedTuple):
    """The arguments that forward and backward share, unpacked from the ops' flat list."""

    student: Side
    teacher: Side
    mask: Tensor | None
    tokens: Tensor | None
    spec: RowSpec
    workspace_bytes: int | None
    backend: str
    numbers: Tensor | None

    @classmethod
    def unpack(cls, flat: tuple[Any, ...]) -> "Call":
        return cls(Side(*flat[:6]), Side(*flat[6:12]), flat[12], flat[13], RowSpec(*flat[14:22]), *flat[22:25])

    def settled(self) -> "Call":
        """The same with its spec's numbers read from the tensor that holds them inside torch.compile."""
        spec = self.spec
        values = numbers_in(self.numbers, spec.temperature, spec.parameter, spec.hard_weight)
        return self._replace(spec=spec.with_numbers(*values))

    @property
    def dtype(self) -> torch.dtype:
        hidden = torch.promote_types(self.student.hidden.dtype, self.teacher.hidden.dtype)
        return torch.promote_types(hidden, torch.float32)

    @property
    def vocab(self) -> int:
        return min(self.student.weight.shape[0], self.teacher.weight.shape[0])

    @property
    def products(self) -> Products | None:
        """What the plan must know where gradients have a tile of their own."""
        sides = (self.student.weight, self.teacher.weight)
        own, other = (product_dtype(weight.dtype, self.dtype, weight.device, self.backend) for weight in sides)
        grad = grad_dtype(self.student.weight.dtype, self.dtype, self.student.weight.device, self.backend)
        if grad == self.dtype:
            return None
        widths = (self.student.hidden.shape[1], self.teacher.hidden.shape[1])
        return Products(*widths, own.itemsize, other.itemsize, grad.itemsize, weight_grad=True)

    @property
    def fused(self) -> bool:
        """Whether a kernel can go straight from hidden states to scores, the value among them."""
        value_is_a_score = (self.spec.divergence, self.spec.parameter) in FUSED_VALUES and not self.spec.hard_weight
        return self.backend == "triton" and value_is_a_score and serves(self.student, self.teacher)

    def fused_scores(self, at: slice | Tensor) -> Tensor:
        """Scores [9, N'] of the rows `at`."""
        student, teacher = (side._replace(hidden=side.hidden[at]) for side in (self.student, self.teacher))
        run = kernel("score_tokens", self.backend, student.hidden.device)
        return run_scores(run, student, teacher, None if self.tokens is None else self.tokens[at], self.spec)

    def _plan(self, n: int, *, full_width: bool) -> tuple[ChunkPlan, tuple[int, int]]:
        """The plan of n rows, and the widths of the student's and the teacher's tile."""
        widths = (self.student.weight.shape[0], self.teacher.weight.shape[0]) if full_width else (self.vocab, self.vocab)
        weight = self.student.weight
        products = product_dtype(weight.dtype, self.dtype, weight.device, self.backend)
        plan = plan_chunks(
            n,
            *widths,
            itemsize=self.dtype.itemsize,
            workspace_bytes=workspace(weight.device, self.workspace_bytes, products),
            temporaries=EAGER_TEMPORARIES if self.backend == "eager" else 0,
            products=self.products,
        )
        return plan, widths

    def one_chunk(self, *, full_width: bool) -> bool:
        """Whether all N rows, masked or not, are one chunk."""
        return self._plan(self.student.hidden.shape[0], full_width=full_width)[0].chunks <= 1

    def loop(self, chosen: Tensor | None, *, full_width: bool = False) -> TileLoop:
        """The chunk loop over the chosen rows (None: all)."""
        n = self.student.hidden.shape[0] if chosen is None else chosen.numel()
        plan, widths = self._plan(n, full_width=full_width)
        return TileLoop(
            self.student,
            self.teacher,
            self.tokens,
            self.spec,
            plan,
            self.backend,
            chosen=chosen,
            dtype=self.dtype,
            widths=widths,
        )
