"""The static account of linear_divergence on a GPU, and the time predicted from it: python -m tools.account

Nothing here is measured on a GPU. The kernels' bytes are those that their launches declare (tests/kernels/test_account.py
counts them in Triton's interpreter); a matrix product moves its operands and its result once. Predicted time: floating-point
operations / rate + bytes / bandwidth, of every launch after the other, nothing overlapped. The floor is the same of exactly
those matrix products, unchunked: 16-bit operands, float32 logits. The rate is 70 % of the dense 16-bit peak, the bandwidth the
data sheet's.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from bench.cases import GPU_CASES, Case
from bench.report import markdown_table, write_json
from topd.ops.shared.plan import ChunkPlan, Products, plan_chunks
from topd_kernels.divergence_rows import launches as divergence_rows

PARAMETERS = {"reverse_kl": 0.0, "forward_kl": float("inf"), "jsd": 0.5}
# Floating-point operations of an entry, exponentials counted as one: far below what the bytes cost.
FLOP = {"reverse_kl": 10 + 45, "forward_kl": 6 + 41, "jsd": 6 + 100 + 103}
TILE, NARROW = 4, 2
GIB = 1 << 30


class Device(NamedTuple):
    name: str
    matrix_flop: float  # a second, dense 16-bit, 70 % of the peak
    bandwidth: float  # bytes a second


DEVICES = [
    Device("H100 SXM", 0.7 * 989e12, 3.35e12),
    Device("A100 SXM 80GB", 0.7 * 312e12, 2.04e12),
    Device("MI300X", 0.7 * 1307e12, 5.3e12),
]
SHAPES = list(GPU_CASES.values())


class Cost(NamedTuple):
    """Floating-point operations and bytes for each (row, vocabulary) entry."""

    flop: float
    byte: float

    def seconds(self, device: Device) -> float:
        """Return the time of an entry."""
        return self.flop / device.matrix_flop + self.byte / device.bandwidth


def kernel_bytes(divergence: str, rows: int, vocab: int) -> float:
    """Return the bytes that the row kernels move for an entry: float32 tiles, the gradient in 16 bits."""
    student, teacher = (torch.empty(rows, vocab, device="meta") for _ in range(2))
    grad = torch.empty(rows, vocab, dtype=torch.bfloat16, device="meta")
    spec = divergence_rows.Spec(1.0, None, 1.0, None, 1.0, divergence, PARAMETERS[divergence], hard_weight=0.0)
    order, _ = divergence_rows.launches(student, teacher, None, None, None, spec, grad, scores=False)
    return sum(launch.moved_bytes for launch in order) / (rows * vocab)


def _products(shape: Case, weight_grad: bool) -> tuple[float, Products]:
    """Return the matrix flop of an entry, and what the plan must know of the products."""
    student, teacher = shape.student_width, shape.teacher_width
    flop = 2.0 * (student * (3 if weight_grad else 2) + teacher)
    return flop, Products(student, teacher, NARROW, NARROW, NARROW, weight_grad)


def floor(shape: Case, *, weight_grad: bool) -> Cost:
    """Return the cost of the bare products, each weight read once a product, d weight written once in 16 bits."""
    flop, _ = _products(shape, weight_grad)
    tiles = 2 * TILE + NARROW * (1 + weight_grad)  # both logits written, dlogits read once or twice
    weights = NARROW * (shape.student_width * (2 + weight_grad) + shape.teacher_width) / shape.n
    return Cost(flop, tiles + weights)


def predicted(shape: Case, divergence: str, plan: ChunkPlan, *, weight_grad: bool) -> Cost:
    """Return the cost of linear_divergence, forward and backward, under a mean."""
    flop, products = _products(shape, weight_grad)
    tiles = 2 * TILE + NARROW * (1 + weight_grad)
    kernels = kernel_bytes(divergence, plan.rows, shape.vocab)
    scaled = (4 + NARROW) * shape.student_width * weight_grad / shape.n  # c d weight, cast
    return Cost(flop, tiles + kernels + products.bytes_per_column(plan.rows, plan.pile) + scaled)


def plan_of(shape: Case, workspace_bytes: int, *, weight_grad: bool) -> ChunkPlan:
    """Return the chunks that the planner takes."""
    products = _products(shape, weight_grad)[1]
    return plan_chunks(shape.n, shape.vocab, shape.vocab, workspace_bytes=workspace_bytes, products=products)


def ratio(shape: Case, device: Device, divergence: str, workspace_bytes: int, *, weight_grad: bool) -> float:
    """Return the predicted time over the floor's."""
    plan = plan_of(shape, workspace_bytes, weight_grad=weight_grad)
    time = predicted(shape, divergence, plan, weight_grad=weight_grad).seconds(device)
    return time / floor(shape, weight_grad=weight_grad).seconds(device)


def workspace_for(shape: Case, device: Device, divergence: str, bound: float, *, weight_grad: bool) -> int | None:
    """Return the smallest workspace, in steps of a quarter GiB, that reaches a ratio; None where one chunk does not."""
    for quarter in range(1, 4 * 64):
        size = quarter * GIB // 4
        if ratio(shape, device, divergence, size, weight_grad=weight_grad) <= bound:
            return size
        if plan_of(shape, size, weight_grad=weight_grad).chunks == 1:
            return None
    return None


def _row(shape: Case, device: Device, divergence: str, weight_grad: bool) -> dict[str, object]:
    """Return a line of the table."""
    flags = {"weight_grad": weight_grad}
    plan = plan_of(shape, 2 * GIB, **flags)
    floor_cost, cost = floor(shape, **flags), predicted(shape, divergence, plan, **flags)
    entries, reached = shape.n * shape.vocab, workspace_for(shape, device, divergence, 1.25, **flags)
    return {
        "shape": shape.name,
        "device": device.name,
        "divergence": divergence,
        "products": 4 if weight_grad else 3,
        "rows a chunk": plan.rows,
        "chunks a pile": plan.pile,
        "bytes an entry": round(cost.byte, 1),
        "floor, ms": round(entries * floor_cost.seconds(device) * 1e3, 1),
        "predicted, ms": round(entries * cost.seconds(device) * 1e3, 1),
        "of the floor": round(cost.seconds(device) / floor_cost.seconds(device), 2),
        "1.25 from": "one chunk is above it" if reached is None else f"{reached / GIB:g} GiB",
    }


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything there")
    options = parser.parse_args()
    rows = [
        _row(shape, device, divergence, weight_grad)
        for device in DEVICES
        for shape in SHAPES
        for divergence, weight_grad in (("reverse_kl", True), ("jsd", True), ("reverse_kl", False))
    ]
    print("PREDICTED, not measured: 8,192 rows, bfloat16, forward and backward, workspace 2 GiB, nothing overlapped.\n")
    print(markdown_table(list(rows[0]), [[str(value) for value in row.values()] for row in rows]))
    if options.json:
        write_json(options.json, {"predicted": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
