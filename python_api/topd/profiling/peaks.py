"""The peak of memory inside a block: of the CUDA allocator with the stage that reached it, or of this process."""

from typing import Protocol

import torch

from topd.memory import MIB, resident_mib, settled_mib


class Peak(Protocol):
    """A measurement that has begun; `source` says in words where it comes from."""

    source: str

    def stage_ends(self, stage: str) -> None:
        """Take note of what the stage needed at most."""

    def mib(self) -> float | None:
        """Return the most beyond what was in use at the beginning; None where it cannot be measured."""

    def by_stage(self) -> dict[str, float]:
        """Return the same of each stage, as far as it is known."""


class HostPeak:
    """The high-water mark of this process, which the beginning resets."""

    source = "resident memory of this process at its high-water mark, beyond what was resident when the block began"

    def __init__(self) -> None:
        self._baseline = settled_mib()

    def stage_ends(self, stage: str) -> None:
        pass

    def mib(self) -> float | None:
        high = resident_mib("VmHWM")
        return None if self._baseline is None or high is None else high - self._baseline

    def by_stage(self) -> dict[str, float]:
        return {}


class CudaPeak:
    """The CUDA allocator's peak, which the beginning and the end of each stage reset."""

    source = "memory allocated by torch on the GPU, beyond what was allocated when the block began"

    def __init__(self, device: torch.device) -> None:
        self._device, self._stages = device, dict[str, float]()
        torch.cuda.reset_peak_memory_stats(device)
        self._before = torch.cuda.memory_allocated(device)

    def stage_ends(self, stage: str) -> None:
        mib = (torch.cuda.max_memory_allocated(self._device) - self._before) / MIB
        self._stages[stage] = max(mib, self._stages.get(stage, 0.0))
        torch.cuda.reset_peak_memory_stats(self._device)

    def mib(self) -> float | None:
        return max(self._stages.values(), default=None)

    def by_stage(self) -> dict[str, float]:
        return dict(self._stages)


def peak_of(device: torch.device) -> Peak:
    """Begin to measure on a device."""
    return CudaPeak(device) if device.type == "cuda" else HostPeak()
