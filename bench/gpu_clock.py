"""Time and memory on a device: CUDA events with a cold L2, contenders by turns, the allocator's peak, bandwidth of a copy."""

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bench.measure import Sample, Spread

MIB = 1 << 20
# Reads and writes this much before each call; no device's L2 is larger than a quarter of it.
FLUSH_BYTES = 1 << 30
COPY_BYTES = 1 << 30


@dataclass(frozen=True)
class Taken:
    """First call of a contender: its result and the peak of the allocator beyond what was there and what it returns, or why
    there is none."""

    result: Any
    peak_mib: float | None
    reason: str = ""


class Clock:
    """A device's clock. On a CPU, for tests, wall time."""

    def __init__(self, device: torch.device, flush_bytes: int = FLUSH_BYTES) -> None:
        self.device = device
        size = flush_bytes if device.type == "cuda" else 1
        self.flushed = torch.empty(size, dtype=torch.int8, device=device)

    def time_ms(self, run: Callable[[], object]) -> float:
        """One call. The flush also keeps the device busy while the host queues what comes after it."""
        self.flushed.zero_()
        if self.device.type != "cuda":
            began = time.perf_counter()
            run()
            return (time.perf_counter() - began) * 1e3
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        result = run()
        stop.record()
        stop.synchronize()
        del result
        return float(start.elapsed_time(stop))

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def first(self, run: Callable[[], Any], returned_bytes: Callable[[Any], int]) -> Taken:
        """Warm up twice, the second time for the peak: the first compiles and fills the libraries' workspaces."""
        try:
            run()
            self.synchronize()
            gc.collect()
            if self.device.type != "cuda":
                return Taken(run(), None)
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            result = run()
            self.synchronize()
            peak = torch.cuda.max_memory_allocated(self.device) - before - returned_bytes(result)
            return Taken(result, peak / MIB)
        except torch.OutOfMemoryError:
            reason = "out of memory"
        except Exception as error:
            reason = f"failed: {type(error).__name__}: {str(error).partition(chr(10))[0][:120]}"
        self.release()  # after the handler, which holds the frames and their tensors
        return Taken(None, None, reason)

    def release(self) -> None:
        """Give cached memory back."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def interleave(self, runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[Sample]]:
        """Rounds in which each contender runs once."""
        samples: dict[str, list[Sample]] = {name: [] for name in runs}
        gc.collect()
        enabled = gc.isenabled()
        gc.disable()
        try:
            for _ in range(rounds):
                for name, run in runs.items():
                    samples[name].append(Sample(self.time_ms(run), 0))
        finally:
            if enabled:
                gc.enable()
        return samples

    def copied(self, size: int = COPY_BYTES) -> float:
        """Bytes per second of a copy, those read and those written: the bandwidth that kernels are held against."""
        source = torch.empty(size, dtype=torch.int8, device=self.device)
        target = torch.empty_like(source)
        target.copy_(source)
        times = [self.time_ms(lambda: target.copy_(source)) for _ in range(5)]
        return 2 * size / (Spread.of(times).median / 1e3)


class Budget:
    """The seconds of a run, shared out among the lines that are left."""

    def __init__(self, seconds: float, lines: int) -> None:
        self.end, self.lines = time.monotonic() + seconds, lines

    def share(self) -> float:
        """Seconds for the next line; 0 where time has run out."""
        left = max(0.0, self.end - time.monotonic())
        found = left / max(1, self.lines)
        self.lines -= 1
        return found


def spread_ms(samples: list[Sample]) -> Spread:
    return Spread.of([sample.time_ms for sample in samples])
