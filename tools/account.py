"""The static account of linear_divergence on a GPU, and the time predicted from it: python -m tools.account

Nothing here is measured on a GPU. Every launch comes after the other, nothing overlapped:

    products    flop / rate, of full tiles of 128 x 256: rows that fill no tile, and processors that wait for the last tiles
                (a product may be split along its sum) cost as much as full ones; and what they read and write / bandwidth
    kernels     the larger of bytes / bandwidth and instructions / issue rate, of each: the bytes that a launch declares
                (tests/kernels/test_account.py counts them), the instructions of topd/costs/instructions.json
    d weight    read and written in float32 by every pile but the first, which writes; read and cast once more by backward

The floor is the same of exactly those products, unchunked: 16-bit operands, float32 logits, d weight written in 16 bits. Left
out on both sides: what is of the hidden states' size, what a kernel does outside its main loop, the host. Rates are those of
topd/costs/devices.py.
"""

import argparse
import sys
from pathlib import Path

from tools.instructions import divergence_launches, held, instructions_of
from topd.costs.devices import DEVICES, Device
from topd.costs.products import (
    NARROW,
    Seconds,
    call_time,
    default_plan,
    product_bytes,
    product_flop,
    slower_of,
)
from topd.ops.shared.plan import ChunkPlan
from topd_bench.cases import GPU_CASES, Case
from topd_bench.report import markdown_table, write_json

SHAPES = list(GPU_CASES.values())
ROWS = (("reverse_kl", True), ("jsd", True), ("reverse_kl", False))
GIB = 1 << 30


def unchunked(shape: Case) -> ChunkPlan:
    """Return the plan of the floor: one chunk."""
    return ChunkPlan(shape.n, shape.n, 1, 0)


def floor(shape: Case, device: Device, *, weight_grad: bool) -> Seconds:
    """Return the time of the bare products, unchunked; d weight is written in 16 bits."""
    plan = unchunked(shape)
    moved = product_bytes(shape, plan, weight_grad=weight_grad)
    moved -= (4 - NARROW) * shape.vocab * shape.student_width * weight_grad
    flop = product_flop(shape, device, plan, weight_grad=weight_grad)
    return Seconds(flop / device.product_flop, moved / device.bandwidth, 0.0)


def kernels(shape: Case, device: Device, divergence: str, rows: int) -> Seconds:
    """Return the time of the row kernels for all rows, in chunks of so many."""
    launches = divergence_launches(divergence, rows, shape.vocab, device.target)
    chunk = slower_of(
        (launch.moved_bytes / device.bandwidth, instructions * rows * shape.vocab / device.issue_rate)
        for launch, instructions in zip(launches, instructions_of(divergence, device.target, launches), strict=True)
    )
    return Seconds(0.0, chunk.bytes * shape.n / rows, chunk.issue * shape.n / rows)


def predicted(shape: Case, device: Device, divergence: str, plan: ChunkPlan, *, weight_grad: bool) -> Seconds:
    """Return the time of linear_divergence, forward and backward, under a mean."""
    return call_time(shape, device, plan, kernels(shape, device, divergence, plan.rows), weight_grad=weight_grad)


def bound(time: Seconds, least: Seconds) -> str:
    """Return what most of the time above the floor goes to."""
    above = {name: getattr(time, name) - getattr(least, name) for name in Seconds._fields}
    return max(above, key=lambda name: above[name])


def ratio(shape: Case, device: Device, divergence: str, plan: ChunkPlan, *, weight_grad: bool) -> float:
    """Return the predicted time over the floor's."""
    time = predicted(shape, device, divergence, plan, weight_grad=weight_grad)
    return time.total / floor(shape, device, weight_grad=weight_grad).total


def row(shape: Case, device: Device, divergence: str, *, weight_grad: bool) -> dict[str, object]:
    """Return a line of the table."""
    plan = default_plan(shape, device, weight_grad=weight_grad)
    time = predicted(shape, device, divergence, plan, weight_grad=weight_grad)
    least = floor(shape, device, weight_grad=weight_grad)
    launches = divergence_launches(divergence, plan.rows, shape.vocab, device.target)
    return {
        "shape": shape.name,
        "device": device.name,
        "divergence": divergence,
        "products": 4 if weight_grad else 3,
        "workspace, GiB": round(plan.workspace_bytes / GIB, 1),
        "rows a chunk": plan.rows,
        "chunks a pile": plan.pile,
        "instructions": round(sum(instructions_of(divergence, device.target, launches))),
        "products, ms": round(time.products * 1e3, 1),
        "bytes, ms": round(time.bytes * 1e3, 1),
        "issue, ms": round(time.issue * 1e3, 1),
        "predicted, ms": round(time.total * 1e3, 1),
        "floor, ms": round(least.total * 1e3, 1),
        "of the floor": round(time.total / least.total, 2),
        "bound": bound(time, least),
    }


def table() -> list[dict[str, object]]:
    """Return every line."""
    flags = [(divergence, weight_grad) for divergence, weight_grad in ROWS]
    return [row(shape, device, name, weight_grad=grad) for device in DEVICES for shape in SHAPES for name, grad in flags]


def text(rows: list[dict[str, object]]) -> str:
    """Return the table as printed."""
    head = (
        "PREDICTED, not measured: 8,192 rows, bfloat16, forward and backward, the default workspace where 30 GB of the device\n"
        f"are taken by other things, instructions an entry as Triton {held()['triton']} compiles them.\n\n"
    )
    return head + markdown_table(list(rows[0]), [[str(value) for value in each.values()] for each in rows]) + "\n"


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything there")
    options = parser.parse_args()
    rows = table()
    print(text(rows))
    if options.json:
        write_json(options.json, {"predicted": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
