"""One way of `topd profile --run` in a process of its own: `python -m topd_bench.profile_worker ASKED.json REPORT.json`."""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from topd.files import write_json
from topd.memory import peak_mib
from topd.profiling.recorder import Recorder
from topd_bench.cases import Inputs
from topd_bench.ways import random_inputs, value_and_gradients

TINY = {"n": 64, "vocab": (512, 512), "width": (64, 64)}


def measure(asked: dict[str, Any]) -> dict[str, Any]:
    """Return peak memory of the first call and the median time of those after it; with a trace also the time by kind of work.

    Args:
        asked: name, loss, dtype, device, n, vocab and width of both sides, trained, rounds: how many calls are timed, and
            trace: a path, or None.
    """
    device, dtype = torch.device(asked["device"]), getattr(torch, asked["dtype"])

    def inputs(sizes: dict[str, Any]) -> Inputs:
        torch.manual_seed(0)
        with device:
            return random_inputs(sizes["n"], tuple(sizes["vocab"]), tuple(sizes["width"]), dtype, trained=asked["trained"])

    def step(given: Inputs) -> None:
        value_and_gradients(asked["name"], given, asked["loss"])

    step(inputs(TINY))
    given = inputs(asked)
    if device.type == "cuda":  # kernels are compiled and tuned; the allocator's peak of a later call is the same
        step(given)
    with peak_mib(device) as peak:
        step(given)
        mib = peak()

    def once() -> float:
        return seconds_of(lambda: step(given), device)

    report: dict[str, Any] = {
        "peak_mib": mib,
        "seconds": statistics.median(once() for _ in range(asked["rounds"])),
        "kinds": None,
    }
    if asked["kinds"]:
        recorder = Recorder(device)
        with recorder.recording():
            wall = once()
        report["kinds"] = recorder.seconds_by_kind(wall)
        if asked["trace"]:
            recorder.write(Path(asked["trace"]))
    return report


def seconds_of(step: Callable[[], None], device: torch.device) -> float:
    """Return how long a step takes, with the GPU's work."""
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def main() -> int:
    """Measure what a file asks for, and write the report to another."""
    asked, report = map(Path, sys.argv[1:])
    write_json(report, measure(json.loads(asked.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
