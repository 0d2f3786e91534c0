"""torch.profiler around a block: a trace in Chrome's format, and what its events say."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from topd.files import whole

WAITS = ("Synchronize",)  # cudaDeviceSynchronize, cudaStreamSynchronize, cudaEventSynchronize, and HIP's of these names
# The first kind one of whose words stands in the name of an operator or a kernel is its kind.
KINDS = {
    "row kernels": ("topd::", "divergence", "logprob", "softmax", "sinkhorn", "transport", "statistics", "sweep", "_kernel_0d"),
    "matrix products": ("mm", "matmul", "gemm", "linear", "nvjet", "cutlass", "xmma", "dot"),
    "copies and casts": ("copy", "memcpy", "memset", "aten::to", "fill", "zero", "cat", "clone", "contiguous", "cast", "index"),
}
PRODUCTS_OF_OURS = ("addmm", "packing")  # matrix products among topd's own operators
OTHER = "other operators"


def kind_of(name: str) -> str:
    """Return which kind of work an operator or a kernel does, by its name."""
    lower = name.lower()
    if lower.startswith("topd::") and any(word in lower for word in PRODUCTS_OF_OURS):
        return "matrix products"
    return next((kind for kind, words in KINDS.items() if any(word in lower for word in words)), OTHER)


class Recorder:
    """A run of torch.profiler.

    Attributes:
        profiler: torch's.
        device: whose activity is recorded beside the host's.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        self.profiler = torch.profiler.profile(activities=activities)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what runs in this block."""
        with self.profiler:
            yield

    def write(self, path: Path) -> None:
        """Write the trace."""
        with whole(path) as unfinished:
            self.profiler.export_chrome_trace(str(unfinished))

    def seconds_by_kind(self) -> dict[str, float]:
        """Return the device's time of each kind of work; of a CPU the operators' own."""
        seconds = dict.fromkeys([*KINDS, OTHER], 0.0)
        on_gpu = self.device.type == "cuda"
        for event in self.profiler.key_averages():
            own: Any = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            seconds[kind_of(event.key)] += own / 1e6
        return seconds

    def host_waits(self) -> dict[str, float]:
        """Return how often, and how many seconds, the host waited for the GPU; the profiler's own wait at its end counts."""
        waits = [event for event in self.profiler.key_averages() if event.key.endswith(WAITS)]
        return {"count": sum(event.count for event in waits), "seconds": sum(event.cpu_time_total for event in waits) / 1e6}


def another_profiler_runs() -> bool:
    """Return whether torch.profiler records already; it cannot run twice."""
    return torch.autograd.profiler._is_profiler_enabled
