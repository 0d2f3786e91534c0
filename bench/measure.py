"""Timing by interleaved rounds, ratios by pairs, and what there is to know about the machine.

A shared machine drifts over seconds, so contenders take turns, A B C A B C, and two are compared by the median of the
ratios of neighbours in one round, quoted with the smallest and the largest.
"""

import gc
import os
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.peers import Contender, trl_version


@dataclass(frozen=True)
class Sample:
    """One call: wall time, and the pages that the kernel had to hand out meanwhile (minor faults, 4 KiB each)."""

    time_ms: float
    page_faults: int


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of a few numbers."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


def sample(contender: Contender) -> Sample:
    """Time one call; its results are freed after the clock has stopped."""
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    start = time.perf_counter()
    result = contender()
    time_ms = (time.perf_counter() - start) * 1e3
    taken = Sample(time_ms, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)
    del result
    return taken


def interleave(contenders: Mapping[str, Contender], rounds: int, progress: Callable[[int], None]) -> dict[str, list[Sample]]:
    """An untimed warm-up round, then `rounds` rounds in which each contender runs once; progress is told the round."""
    samples: dict[str, list[Sample]] = {name: [] for name in contenders}
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for number in range(rounds + 1):
            progress(number)
            for name, contender in contenders.items():
                taken = sample(contender)
                if number:
                    samples[name].append(taken)
    finally:
        if was_enabled:
            gc.enable()
    return samples


def ratio(above: Sequence[Sample], below: Sequence[Sample]) -> Spread:
    """Time of `above` over `below`, round by round."""
    return Spread.of([a.time_ms / b.time_ms for a, b in zip(above, below, strict=True)])


def cpu_model() -> str:
    """The processor's name as the kernel gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def git_commit() -> str:
    """The checkout's commit, with "+changes" where tracked files differ from it, or "unknown"."""
    git = ("git", "--no-optional-locks", "-C", str(Path(__file__).parent))
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        status = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+changes" if status.stdout.strip() else "")


def machine(backend: str, malloc: str) -> dict[str, str | int | None]:
    """What a reader needs to judge a number; backend is the one that runs, malloc the name of allocator settings."""
    return {
        "cpu": cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "trl": trl_version(),
        "libc": " ".join(platform.libc_ver()),
        "commit": git_commit(),
        "backend": backend,
        "malloc": malloc,
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY"),
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT"),
        "load_average": f"{os.getloadavg()[0]:.2f}",
    }
