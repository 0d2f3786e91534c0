"""torch.profiler around a block: a trace in Chrome's format, and what its events say."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from topd.files import whole

WAITS = ("Synchronize",)  # cudaDeviceSynchronize, cudaStreamSynchronize, cudaEventSynchronize, and HIP's of these names
PRODUCTS, ROWS, COPIES, HOST = "matrix products", "row kernels", "copies and casts", "host"
# What an operator of torch or a kernel does, by its name: the first pattern that fits, else a row kernel. Operators that only
# make views and memory are the host's, as are those that call others.
KINDS = (
    (PRODUCTS, r"aten::(mm|addmm|bmm|baddbmm|matmul|linear|dot)_?$|bf16_addmm|gemm|nvjet|cutlass|xmma"),
    (COPIES, r"aten::(copy|_to_copy|to|clone|contiguous|cat|fill|zero|zeros|index|masked_fill)_?$"),
    (COPIES, r"(?i:memcpy|memset|copy_kernel|FillFunctor)"),
    (HOST, r"aten::(empty|new_empty|slice|as_strided|view|alias|select|permute|t|transpose)(_|$)"),
    (HOST, r"aten::(unsqueeze|squeeze|expand|detach|narrow|reshape|_unsafe_view)(_|$)"),
    (HOST, r"autograd|Backward|Function|topd::(linear|topk)_|^cuda[A-Z]|^hip[A-Z]|^Activity|^Profiler|^Optimizer"),
)


def kind_of(name: str) -> str:
    """Return which kind of work an operator or a kernel does, by its name."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name)), ROWS)


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

    def seconds_by_kind(self, wall: float) -> dict[str, float]:
        """Return a time by the kind of work that it went to: on a GPU by its kernels, on a CPU by the operators' own time.

        Args:
            wall: seconds of what was recorded; what no operator or kernel accounts for is the host's.
        """
        seconds = dict.fromkeys((PRODUCTS, ROWS, COPIES), 0.0)
        on_gpu = self.device.type == "cuda"
        for event in self.profiler.key_averages():
            kind = kind_of(event.key)
            if kind != HOST and str(event.device_type).endswith("CUDA") == on_gpu:
                own: float = event.self_device_time_total if on_gpu else event.self_cpu_time_total
                seconds[kind] += own / 1e6
        return seconds | {HOST: max(0.0, wall - sum(seconds.values()))}

    def host_waits(self) -> dict[str, float]:
        """Return how often, and how many seconds, the host waited for the GPU; the profiler's own wait at its end counts."""
        waits = [event for event in self.profiler.key_averages() if event.key.endswith(WAITS)]
        return {"count": sum(event.count for event in waits), "seconds": sum(event.cpu_time_total for event in waits) / 1e6}


def another_profiler_runs() -> bool:
    """Return whether torch.profiler records already; it cannot run twice."""
    return torch.autograd.profiler._is_profiler_enabled
