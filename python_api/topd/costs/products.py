"""Time of linear_divergence's matrix products on a GPU, predicted; `python -m tools.account` says what the model is."""

from collections.abc import Iterable
from typing import NamedTuple, Protocol

from topd.costs.devices import Device
from topd.ops.shared.plan import GPU_BLOCK, ChunkPlan, Products, default_workspace, plan_chunks, wanted_workspace

TILE, NARROW = 4, 2
# A product's tile, and how often its sum may be split.
TILE_ROWS, TILE_COLUMNS, SPLITS = 128, 256, 8
# Bytes that backward moves for an entry of d weight: read in float32, c d weight written in 16 bits.
SCALE_AND_CAST = 6


class Shape(Protocol):
    """N tokens, a common vocabulary V, hidden widths H_s and H_t."""

    @property
    def n(self) -> int: ...
    @property
    def vocab(self) -> int: ...
    @property
    def student_width(self) -> int: ...
    @property
    def teacher_width(self) -> int: ...


class Seconds(NamedTuple):
    """A time by what bounds it: the products' operations, bytes through memory, instructions issued."""

    products: float
    bytes: float
    issue: float

    @property
    def total(self) -> float:
        """Return the whole time."""
        return sum(self)


def products_of(shape: Shape, weight_grad: bool) -> Products:
    """Return what the plan must know of the products."""
    return Products(shape.student_width, shape.teacher_width, NARROW, NARROW, NARROW, weight_grad)


def plan_of(shape: Shape, workspace_bytes: int, *, weight_grad: bool) -> ChunkPlan:
    """Return the chunks that the planner takes."""
    products = products_of(shape, weight_grad)
    vocabs = (shape.vocab, shape.vocab)
    return plan_chunks(shape.n, *vocabs, workspace_bytes=workspace_bytes, products=products, block=GPU_BLOCK)


def default_plan(shape: Shape, device: Device, *, weight_grad: bool) -> ChunkPlan:
    """Return the chunks that the planner takes where the workspace is the default."""
    wanted = wanted_workspace(shape.n, shape.vocab, shape.vocab, products=products_of(shape, weight_grad))
    size = default_workspace("cuda", device.available_bytes, wanted=wanted)
    return plan_of(shape, size, weight_grad=weight_grad)


def multiplied(rows: int, columns: int, processors: int) -> float:
    """Return the entries of a product that would take as long as rows x columns, were its tiles and waves of them all full."""
    tiles = _cdiv(rows, TILE_ROWS) * _cdiv(columns, TILE_COLUMNS)
    waves = min(_cdiv(tiles * split, processors) / split for split in range(1, SPLITS + 1))
    return waves * processors * TILE_ROWS * TILE_COLUMNS


def product_flop(shape: Shape, device: Device, plan: ChunkPlan, *, weight_grad: bool) -> float:
    """Return the floating-point operations of all products, tiles that are not full included."""
    student, teacher, vocab, processors = shape.student_width, shape.teacher_width, shape.vocab, device.processors
    flop = 0.0
    for start, stop in plan.bounds():
        flop += 2 * (student + teacher) * multiplied(stop - start, vocab, processors)
    for pile in plan.piles():
        rows = pile[-1][1] - pile[0][0]
        flop += 2 * vocab * multiplied(rows, student, processors)
        flop += 2 * rows * multiplied(vocab, student, processors) * weight_grad
    return flop


def product_bytes(shape: Shape, plan: ChunkPlan, *, weight_grad: bool) -> float:
    """Return the bytes of all products: logits written, dlogits read once or twice, both weights once a chunk, the student's
    once more a pile, d weight read and written in float32 by every pile but the first, which writes."""
    piles = len(plan.piles())
    tiles = 2 * TILE + NARROW * (1 + weight_grad)
    weights = NARROW * (plan.chunks * (shape.student_width + shape.teacher_width) + piles * shape.student_width)
    weight_sums = 4 * (2 * piles - 1) * shape.student_width * weight_grad
    return shape.vocab * (shape.n * tiles + weights + weight_sums)


def slower_of(kernels: Iterable[tuple[float, float]]) -> Seconds:
    """Return the time of kernels: of each the larger of what its bytes and what its instructions take, given in that order."""
    by_bytes = by_issue = 0.0
    for moving, issuing in kernels:
        by_bytes += moving if moving >= issuing else 0.0
        by_issue += issuing if moving < issuing else 0.0
    return Seconds(0.0, by_bytes, by_issue)


def call_time(shape: Shape, device: Device, plan: ChunkPlan, kernels: Seconds, *, weight_grad: bool) -> Seconds:
    """Return the time of linear_divergence, forward and backward, under a mean, whose row kernels take `kernels`."""
    moved = product_bytes(shape, plan, weight_grad=weight_grad)
    moved += SCALE_AND_CAST * shape.vocab * shape.student_width * weight_grad
    flop = product_flop(shape, device, plan, weight_grad=weight_grad)
    return Seconds(flop / device.product_flop, moved / device.bandwidth + kernels.bytes, kernels.issue)


def _cdiv(x: int, y: int) -> int:
    return -(-x // y)
