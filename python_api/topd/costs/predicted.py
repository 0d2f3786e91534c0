"""The time of linear_divergence on a named GPU, forward and backward under a mean, predicted from shapes alone.

The sum of what `python -m tools.account` has in its table; launches are not asked, only what each goes through: an entry of
both tiles, and the gradient where the last one writes it.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

from topd.costs.devices import Device
from topd.costs.products import NARROW, TILE, Seconds, Shape, call_time, slower_of
from topd.ops.shared.plan import ChunkPlan

INSTRUCTIONS = Path(__file__).with_name("instructions.json")
_READ = 2 * TILE
# Bytes of an entry that each kernel over the vocabulary moves, in the order of their launches.
SWEEPS = {
    "reverse_kl": (_READ, _READ + NARROW),
    "forward_kl": (_READ, _READ + NARROW),
    "jsd": (_READ, _READ, _READ + NARROW),
}


@cache
def _instructions() -> dict[str, dict[str, float]]:
    contents: dict[str, Any] = json.loads(INSTRUCTIONS.read_text())
    counts: dict[str, dict[str, float]] = contents["instructions"]
    return counts


def kernel_time(shape: Shape, device: Device, loss: str) -> Seconds:
    """Return the time of the row kernels: of each the larger of bytes and instructions."""
    entries = shape.n * shape.vocab
    counts = [count for name, count in _instructions().items() if name.startswith(f"{loss} ")]
    return slower_of(
        (moved * entries / device.bandwidth, count[device.target] * entries / device.issue_rate)
        for moved, count in zip(SWEEPS[loss], counts, strict=True)
    )


def predicted_time(shape: Shape, device: Device, loss: str, plan: ChunkPlan, *, weight_grad: bool) -> Seconds:
    """Return the time of a call and its backward, 16-bit operands."""
    return call_time(shape, device, plan, kernel_time(shape, device, loss), weight_grad=weight_grad)


def bound(time: Seconds) -> str:
    """Return what most of the time goes to."""
    return max(Seconds._fields, key=lambda name: float(getattr(time, name)))
