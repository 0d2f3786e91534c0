"""What a launch must take at least on this device: for its bytes, at a copy's rate, and for its instructions, at the rate at
which the multiprocessors issue them."""

from dataclasses import dataclass
from typing import Any

import torch

from topd_bench.gpu.clock import DeviceClock
from topd_bench.machine import most_clock

LANES, SCHEDULERS = 32, 4  # of a warp and of a multiprocessor, of NVIDIA's


@dataclass(frozen=True)
class Rates:
    """Bytes a second of a copy, and instructions of a warp a second at the highest clock; None where it is not known."""

    copy_bytes: float | None
    issued: float | None = None
    family: str = ""

    @classmethod
    def of(cls, clock: DeviceClock) -> "Rates":
        """Measure the copy, and read the clock; neither on a CPU."""
        if clock.device.type != "cuda":
            return cls(None)
        from topd_kernels.shared.blocks import family_of

        properties = torch.cuda.get_device_properties(clock.device)
        hertz = None if torch.version.hip else most_clock(clock.device)
        issued = None if hertz is None else properties.multi_processor_count * SCHEDULERS * hertz
        return cls(clock.copy_bandwidth(), issued, family_of(properties))

    def byte_ms(self, launch: Any) -> float | None:
        """Return the time of a launch's bytes."""
        size = int(launch.moved_bytes)
        return size / self.copy_bytes * 1e3 if self.copy_bytes and size else None

    def issue_ms(self, launch: Any) -> float | None:
        """Return the time of the instructions of its main loop; None where they cannot be counted."""
        instructions = None if self.issued is None else instructions_of(launch, self.family)
        if instructions is None or self.issued is None:
            return None
        return instructions * float(launch.grid[0] * launch.arguments["vocab"]) / LANES / self.issued * 1e3


def instructions_of(launch: Any, family: str) -> float | None:
    """Return a thread's instructions for an entry of the vocabulary, counted in the binary; None of a kernel that does not go
    over one, and on a device whose binaries `tools.binaries` cannot read."""
    from tools.binaries import TARGETS, compile_launch

    if family not in TARGETS:
        return None
    try:
        count = getattr(compile_launch(launch, TARGETS[family]), "instructions", None)
    except Exception:  # a toolkit without its disassembler: no count is no failure
        return None
    return None if count is None else float(count)
