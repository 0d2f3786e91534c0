"""Time and memory on a device: CUDA events with a cold L2, the allocator's peak, the bandwidth of a copy."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from topd_bench.timing import Contender, Sample, Spread

MIB = 1 << 20
# Written before each call; no device's L2 is larger than a quarter of it.
FLUSH_BYTES = 1 << 30
COPY_BYTES = 1 << 30


@dataclass(frozen=True)
class First:
    """A contender's first call: its result and the peak of the allocator beyond what was there and what it returns, or the
    reason why there is none."""

    result: Any
    peak_mib: float | None
    reason: str = ""


class DeviceClock:
    """The clock of `topd_bench.timing` for a device. On a CPU, for tests, it takes wall time. A sample costs `calls` calls."""

    calls = 1

    def __init__(self, device: torch.device, flush_bytes: int = FLUSH_BYTES) -> None:
        self.device = device
        size = flush_bytes if device.type == "cuda" else 1
        self.flushed = torch.empty(size, dtype=torch.int8, device=device)

    def sample(self, run: Contender) -> Sample:
        """Time one call. The flush also keeps the device busy while the host queues what comes after it."""
        self.flushed.zero_()
        if self.device.type != "cuda":
            began = time.perf_counter()
            run()
            return Sample((time.perf_counter() - began) * 1e3)
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        result = run()
        stop.record()
        stop.synchronize()
        del result
        return Sample(float(start.elapsed_time(stop)))

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def first(self, run: Callable[[], Any], returned_bytes: Callable[[Any], int]) -> First:
        """Warm up twice, the second time for the peak: the first compiles and fills the libraries' workspaces."""
        try:
            run()
            self.synchronize()
            gc.collect()
            if self.device.type != "cuda":
                return First(run(), None)
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            result = run()
            self.synchronize()
            peak = torch.cuda.max_memory_allocated(self.device) - before - returned_bytes(result)
            return First(result, peak / MIB)
        except torch.OutOfMemoryError:
            reason = "out of memory"
        except Exception as error:
            reason = f"failed: {type(error).__name__}: {str(error).partition(chr(10))[0][:120]}"
        self.release()  # after the handler, which holds the frames and their tensors
        return First(None, None, reason)

    def release(self) -> None:
        """Give cached memory back."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def free_bytes(self) -> int:
        """Return the memory that is free; on a CPU more than anything asks for."""
        return torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else 1 << 62

    def copy_bandwidth(self, size: int = COPY_BYTES) -> float:
        """Return the bytes per second of a copy, those read and those written: what kernels are held against."""
        source = torch.empty(size, dtype=torch.int8, device=self.device)
        target = torch.empty_like(source)
        target.copy_(source)
        times = [self.sample(lambda: target.copy_(source)).time_ms for _ in range(5)]
        return 2 * size / (Spread.of(times).median / 1e3)


class FreshClock(DeviceClock):
    """The same for what allocates: each sample begins with torch's cache empty, and with a call that is not timed and fills it
    again, so that nobody finds the device full of another one's memory."""

    calls = 2

    def sample(self, run: Contender) -> Sample:
        """Time one call."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        run()
        return super().sample(run)


class Budget:
    """The seconds of a run, shared out among the lines that are left."""

    def __init__(self, seconds: float, lines: int) -> None:
        self.end, self.lines = time.monotonic() + seconds, lines

    def left(self) -> float:
        """Return the seconds that are left."""
        return max(0.0, self.end - time.monotonic())

    def share(self) -> float:
        """Return the seconds for the next line; 0 where time has run out."""
        share = self.left() / max(1, self.lines)
        self.lines -= 1
        return share
