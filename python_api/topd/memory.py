"""How much memory a piece of work needs at its peak: of the GPU where one is used, else of this process on Linux."""

import ctypes
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

MIB, GIB = 1 << 20, 1 << 30
STATUS, CLEAR, MEMINFO = Path("/proc/self/status"), Path("/proc/self/clear_refs"), Path("/proc/meminfo")


def _kib_of(file: Path, field: str) -> int | None:
    """Return a field of a file of /proc, KiB; None where the system does not say."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), None)


def resident_mib(field: str = "VmRSS") -> float | None:
    """Return VmRSS or VmHWM of this process; None where the system does not say."""
    kib = _kib_of(STATUS, field)
    return None if kib is None else kib / 1024


def allocated_bytes() -> int:
    """Return what this process has mapped for its data; 0 where the system does not say."""
    return 1024 * (_kib_of(STATUS, "VmData") or 0)


def used_mib(device: torch.device) -> float | None:
    """Return what is in use on the device, by torch; on a CPU by this process."""
    return torch.cuda.memory_allocated(device) / MIB if device.type == "cuda" else resident_mib()


def total_mib() -> float | None:
    """Return the memory of the machine."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / MIB
    except (ValueError, OSError, AttributeError):
        return None


def free_bytes(device: torch.device) -> int | None:
    """Return the memory that is free on a device; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    kib = _kib_of(MEMINFO, "MemAvailable")
    return None if kib is None else 1024 * kib


@contextmanager
def peak_mib(device: torch.device) -> Iterator[Callable[[], float | None]]:
    """Yield a function that returns what was in use at the peak beyond what is in use now; None where it cannot be measured."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield lambda: (torch.cuda.max_memory_allocated(device) - before) / MIB
        return
    baseline = settled_mib()

    def read() -> float | None:
        peak = resident_mib("VmHWM")
        return None if baseline is None or peak is None else peak - baseline

    yield read


def settled_mib() -> float | None:
    """Give free pages of the heap back, reset the high-water mark, and return what is resident; None where that fails."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        CLEAR.write_text("5")
    except (OSError, AttributeError):
        return None
    resident, high = resident_mib(), resident_mib("VmHWM")
    return None if resident is None or high is None or high - resident > 1 else resident


def size_text(nbytes: float) -> str:
    """Return bytes for a reader, in MiB, or in GiB from 1 GiB on."""
    return f"{nbytes / GIB:,.2f} GiB" if nbytes >= GIB else f"{nbytes / MIB:,.2f} MiB"
