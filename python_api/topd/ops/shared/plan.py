"""How many rows a chunk holds: a pure function of shapes, dtypes, bytes and backend.

A chunk's workspace is the student's and the teacher's tile of logits (the student's becomes the gradient in place) and
what the backend needs beside them.
"""

from dataclasses import dataclass
from typing import NamedTuple

from topd.checks.values import positive_int

MIB = 1 << 20
CPU_WORKSPACE = 512 * MIB
# Where bfloat16 is multiplied as it is: the products are so fast that fresh pages for larger tiles cost more than they save.
CPU_WORKSPACE_BF16 = 256 * MIB
CUDA_WORKSPACE = 2048 * MIB
CUDA_WORKSPACE_LEAST = 64 * MIB
# A call takes at most one part in so many of the memory that is available.
CUDA_SHARE = 4

# [C, V] temporaries that the eager backend's elementwise code keeps alive at its peak, beside the two tiles: 17 at most was
# measured, for the JSD with scores, softcap, bias and hard weight. The compiled backends keep none.
EAGER_TEMPORARIES = 18
# The same for log-probabilities with entropy, softcap and bias.
EAGER_LOGPROB_TEMPORARIES = 14

# Chunks whose 16-bit gradients may wait for one product, at most.
MAX_PILE = 16


@dataclass(frozen=True)
class ChunkPlan:
    """Rows n are cut into `chunks` nearly equal chunks of at most `rows` rows; `workspace_bytes` is what they really use. The
    gradients of `pile` chunks wait for one product."""

    n: int
    rows: int
    chunks: int
    workspace_bytes: int
    pile: int = 1

    def bounds(self) -> list[tuple[int, int]]:
        """Return (start, stop) of each chunk, sizes differing by at most one."""
        if self.n == 0:
            return []
        return [(i * self.n // self.chunks, (i + 1) * self.n // self.chunks) for i in range(self.chunks)]

    def piles(self) -> list[list[tuple[int, int]]]:
        """Return `bounds`, by the pile that a chunk belongs to."""
        bounds = self.bounds()
        return [bounds[i : i + self.pile] for i in range(0, len(bounds), self.pile)]


class Products(NamedTuple):
    """What the matrix products of a call read and write, for the plan on a GPU: the width of both hidden states, bytes of an
    entry of both weights, bytes of a gradient entry in a tile of its own, and whether the weight's gradient is summed."""

    student_width: int
    teacher_width: int
    student_itemsize: int
    teacher_itemsize: int
    grad_itemsize: int
    weight_grad: bool

    def bytes_per_column(self, rows: int, pile: int) -> float:
        """Return the bytes that go through memory for each row and vocabulary entry because rows are cut into chunks: both
        weights are read for every chunk's logits; the student's once more, and d weight read and written, for every pile."""
        forward = self.student_width * self.student_itemsize + self.teacher_width * self.teacher_itemsize
        backward = self.student_width * (self.student_itemsize + (8 if self.weight_grad else 0))
        return forward / rows + backward / (rows * pile)


def default_workspace(device_type: str, available: int | None = None, *, bf16_products: bool = False) -> int:
    """Return the bytes that a call may use for its tiles.

    On a CPU 512 MiB, or 256 where bfloat16 is multiplied as it is. On a GPU the largest power of two within 2 GiB and a quarter
    of the memory that is available, but 64 MiB at least: a power of two, so that a little more or less memory from one step to
    the next, or from one process to another, leaves the plan as it is.
    """
    if device_type == "cpu":
        return CPU_WORKSPACE_BF16 if bf16_products else CPU_WORKSPACE
    workspace = CUDA_WORKSPACE
    while available is not None and workspace > CUDA_WORKSPACE_LEAST and CUDA_SHARE * workspace > available:
        workspace //= 2
    return workspace


def plan_chunks(
    n: int,
    *vocabs: int,
    itemsize: int = 4,
    workspace_bytes: int,
    temporaries: int = 0,
    products: Products | None = None,
) -> ChunkPlan:
    """Plan n rows.

    Args:
        n: rows to compute.
        vocabs: the width of each tile.
        itemsize: bytes of a tile's entry (4, or 8 for float64).
        workspace_bytes: upper bound for the tiles and temporaries together.
        temporaries: further tiles of the smallest width that the backend keeps.
        products: where gradients have a tile of their own: chunks and piles are those with the least traffic.

    Raises:
        ValueError: the workspace does not hold one row.
    """
    positive_int("workspace_bytes", workspace_bytes)
    per_row = itemsize * (sum(vocabs) + temporaries * min(vocabs))
    grad_row = 0 if products is None else products.grad_itemsize * min(vocabs)
    limit = workspace_bytes // (per_row + grad_row)
    if limit < 1:
        raise ValueError(
            f"workspace_bytes must hold at least one row, {per_row + grad_row} bytes for vocabularies of "
            f"{' and '.join(map(str, vocabs))}, got {workspace_bytes}; raise it, or leave it None for the default"
        )
    if n == 0:
        return ChunkPlan(0, 0, 0, 0)
    if products is None:
        return _balanced(n, limit, 1, per_row, 0)
    plans = []
    for pile in range(1, MAX_PILE + 1):
        limit = workspace_bytes // (per_row + pile * grad_row)
        if limit >= 1:
            plans.append(_balanced(n, limit, pile, per_row, grad_row))
    return min(plans, key=lambda plan: products.bytes_per_column(plan.rows, plan.pile))


def _balanced(n: int, limit: int, pile: int, per_row: int, grad_row: int) -> ChunkPlan:
    chunks = -(-n // limit)
    rows, pile = -(-n // chunks), min(pile, chunks)
    return ChunkPlan(n, rows, chunks, rows * (per_row + pile * grad_row), pile)
