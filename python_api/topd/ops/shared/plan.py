"""How many rows a chunk holds: a pure function of shapes, dtypes, bytes and backend.

A chunk's workspace is the student's and the teacher's tile of logits (the student's becomes the gradient in place) and
what the backend needs beside them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from topd.checks.values import positive_int

MIB = 1 << 20
CPU_WORKSPACE = 512 * MIB
# Where bfloat16 is multiplied as it is: the products are so fast that fresh pages for larger tiles cost more than they save.
CPU_WORKSPACE_BF16 = 256 * MIB
# On other devices, where a call does not say what it can use.
GPU_WORKSPACE = 2048 * MIB
GPU_WORKSPACE_LEAST = 64 * MIB
# A call takes at most one part in so many of the memory that is available.
GPU_SHARE = 4
# Rows a chunk that the default makes room for on a GPU: reading the heads again costs 9 % of the products there on an H100, and
# twice the rows would save half of that for twice the memory.
GPU_ROWS = 4096
# Matrix products on a GPU work in tiles of so many rows: one that is not full takes as long as one that is.
GPU_BLOCK = 128

# [C, V] temporaries that the eager backend's elementwise code keeps alive at its peak, beside the two tiles: 17 at most was
# measured, for the JSD with scores, softcap, bias and hard weight. The compiled backends keep none.
EAGER_TEMPORARIES = 18
# The same for log-probabilities with entropy, softcap and bias.
EAGER_LOGPROB_TEMPORARIES = 14

# Chunks whose 16-bit gradients may wait for one product, at most.
MAX_PILE = 16


@dataclass(frozen=True)
class ChunkPlan:
    """Rows n are cut into `chunks` chunks of at most `rows` rows, multiples of `block` but for the last, as equal as these can
    be; `workspace_bytes` is what they really use. The gradients of `pile` chunks wait for one product."""

    n: int
    rows: int
    chunks: int
    workspace_bytes: int
    pile: int = 1
    block: int = 1

    def bounds(self) -> list[tuple[int, int]]:
        """Return (start, stop) of each chunk, sizes differing by at most one block."""
        if self.n == 0:
            return []
        blocks = -(-self.n // self.block)
        edges = [min(self.n, i * blocks // self.chunks * self.block) for i in range(self.chunks + 1)]
        return list(pairwise(edges))

    def piles(self) -> list[list[tuple[int, int]]]:
        """Return `bounds`, by the pile that a chunk belongs to."""
        bounds = self.bounds()
        return [bounds[i : i + self.pile] for i in range(0, len(bounds), self.pile)]

    @property
    def pile_count(self) -> int:
        """Return how many piles there are."""
        return -(-self.chunks // self.pile)


class Products(NamedTuple):
    """What the matrix products of a call read and write, for the plan on a GPU: the width of both hidden states, bytes of an
    entry of both weights, bytes of the gradient entries in tiles of their own, and whether the weight's gradient is summed.
    Where there is no teacher its numbers are 0."""

    student_width: int
    teacher_width: int
    student_itemsize: int
    teacher_itemsize: int
    grad_itemsize: int
    weight_grad: bool

    def bytes_per_column(self, rows: float, pile: float) -> float:
        """Return the bytes that go through memory for each row and vocabulary entry because rows are cut into chunks: both
        weights are read for every chunk's logits; the student's once more, and d weight read and written, for every pile.
        `rows`, `pile`: a chunk's rows and a pile's chunks, on average."""
        forward, backward = self._bytes()
        return forward / rows + backward / (rows * pile)

    def traffic(self, plan: ChunkPlan) -> float:
        """Return those bytes for a plan."""
        return self.bytes_per_column(plan.n / plan.chunks, plan.chunks / plan.pile_count)

    def best_pile(self, row_bytes: int, grad_row_bytes: int, most: int) -> int:
        """Return how many chunks a pile has where a byte of workspace saves most traffic."""
        forward, backward = self._bytes()
        piles = range(1, most + 1)
        return min(piles, key=lambda pile: (forward + backward / pile) * (row_bytes + pile * grad_row_bytes))

    def _bytes(self) -> tuple[int, int]:
        """Return what a chunk's logits and a pile's gradients read and write of each of the vocabulary's rows."""
        forward = self.student_width * self.student_itemsize + self.teacher_width * self.teacher_itemsize
        return forward, self.student_width * (self.student_itemsize + (8 if self.weight_grad else 0))


def default_workspace(
    device_type: str, available: int | None = None, *, wanted: int = GPU_WORKSPACE, bf16_products: bool = False
) -> int:
    """Return the bytes that a call may use for its tiles.

    On a CPU 512 MiB, or 256 where bfloat16 is multiplied as it is. On a GPU what the call can use, `wanted`, but no more than
    the largest power of two within a quarter of the memory that is available, or 64 MiB: a power of two, so that a little more
    or less memory from one step to the next, or from one process to another, leaves the plan as it is.

    Args:
        device_type: "cpu", "cuda" (ROCm too), or another.
        available: bytes of the GPU that are there to be taken; None: not known, and no bound.
        wanted: what `wanted_workspace` returns for the call.
        bf16_products: on a CPU, whether bfloat16 is multiplied as it is.
    """
    if device_type == "cpu":
        return CPU_WORKSPACE_BF16 if bf16_products else CPU_WORKSPACE
    if available is None:
        return wanted
    share = 1 << max(0, (available // GPU_SHARE).bit_length() - 1)
    return min(wanted, max(share, GPU_WORKSPACE_LEAST))


def wanted_workspace(n: int, *vocabs: int, itemsize: int = 4, temporaries: int = 0, products: Products | None = None) -> int:
    """Return the bytes that chunks of 4,096 rows take, or of all rows where there are fewer; with piles as far as a pile saves
    more traffic than the same bytes would as rows. The arguments are those of `plan_chunks`."""
    row_bytes, grad_row_bytes = _row_bytes(vocabs, itemsize, temporaries, products)
    most = min(MAX_PILE, max(1, -(-n // GPU_ROWS)))
    pile = 1 if products is None else products.best_pile(row_bytes, grad_row_bytes, most)
    return min(max(n, 1), GPU_ROWS) * (row_bytes + pile * grad_row_bytes)


def plan_chunks(
    n: int,
    *vocabs: int,
    itemsize: int = 4,
    workspace_bytes: int,
    temporaries: int = 0,
    products: Products | None = None,
    block: int = 1,
) -> ChunkPlan:
    """Plan n rows.

    Args:
        n: rows to compute.
        vocabs: the width of each tile.
        itemsize: bytes of a tile's entry (4, or 8 for float64).
        workspace_bytes: upper bound for the tiles and temporaries together.
        temporaries: further tiles of the smallest width that the backend keeps.
        products: where gradients have a tile of their own: chunks and piles are those with the least traffic.
        block: rows of a chunk are rounded down to a multiple of it (GPU_BLOCK on a GPU) where so many fit.

    Raises:
        ValueError: the workspace does not hold one row.
    """
    positive_int("workspace_bytes", workspace_bytes)
    row_bytes, grad_row_bytes = _row_bytes(vocabs, itemsize, temporaries, products)
    if workspace_bytes < row_bytes + grad_row_bytes:
        raise ValueError(
            f"workspace_bytes must hold at least one row, {row_bytes + grad_row_bytes} bytes for vocabularies of "
            f"{' and '.join(map(str, vocabs))}, got {workspace_bytes}; raise it, or leave it None for the default"
        )
    if n == 0:
        return ChunkPlan(0, 0, 0, 0)
    if products is None:
        return _balanced(n, workspace_bytes // row_bytes, 1, block, (row_bytes, 0))
    plans = []
    for pile in range(1, MAX_PILE + 1):
        if (limit := workspace_bytes // (row_bytes + pile * grad_row_bytes)) >= 1:
            plans.append(_balanced(n, limit, pile, block, (row_bytes, grad_row_bytes)))
    return min(plans, key=products.traffic)


def _row_bytes(vocabs: Sequence[int], itemsize: int, temporaries: int, products: Products | None) -> tuple[int, int]:
    """Return the bytes that a row takes in tiles and temporaries, and those in gradient tiles of their own."""
    grad_itemsize = 0 if products is None else products.grad_itemsize
    return itemsize * (sum(vocabs) + temporaries * min(vocabs)), grad_itemsize * min(vocabs)


def _balanced(n: int, limit: int, pile: int, block: int, row_bytes: tuple[int, int]) -> ChunkPlan:
    """Return as few chunks of at most `limit` rows as there can be, of nearly equal sizes."""
    block = block if block <= limit < n else 1
    limit -= limit % block
    chunks = -(-n // limit)
    rows = min(n, -(-n // (block * chunks)) * block)
    pile = min(pile, chunks)
    return ChunkPlan(n, rows, chunks, rows * (row_bytes[0] + pile * row_bytes[1]), pile, block)
