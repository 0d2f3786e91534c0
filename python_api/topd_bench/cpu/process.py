"""Fresh child processes, since allocator and OpenMP settings are read once, when a process starts.

A worker is the same module run with `--worker PATH`; it writes its report to PATH after each result, so that what was
measured before an interruption is not lost. The parent's environment is never changed.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from topd_bench.command import INTERRUPTED
from topd_bench.report import note

# Waiting threads sleep: two that spin beside a busy process can run 10 to 40 times slower.
QUIET_OPENMP = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}

# "tuned" keeps freed blocks in the heap: by default glibc maps every large block afresh and the kernel zeroes each of
# its pages. MALLOC_MMAP_MAX_=0 says the same to versions of glibc that refuse a threshold above 32 MiB.
MALLOC_MODES: dict[str, dict[str, str]] = {
    "default": {},
    "tuned": {
        "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(64 << 30),
        "MALLOC_TOP_PAD_": str(256 << 20),
    },
}


class Outcome(NamedTuple):
    """A worker's last report (None: it had none yet), and its exit status: 0, INTERRUPTED, or 1 for a failure."""

    report: dict[str, Any] | None
    status: int


def child_environment(malloc: str) -> dict[str, str]:
    """Return this environment with quiet OpenMP threads and exactly the named allocator settings."""
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith("MALLOC_") and name != "GLIBC_TUNABLES"
    }
    return inherited | QUIET_OPENMP | MALLOC_MODES[malloc]


def _wait(process: "subprocess.Popen[bytes]") -> int:
    """Wait for a worker and return its exit status; an interrupt ends the worker too, and nothing is left running."""
    try:
        return process.wait()
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def run_worker(module: str, arguments: Sequence[str], *, malloc: str = "default") -> Outcome:
    """Run `python -m module arguments --worker PATH` and read its report; a failure is told on stderr."""
    with tempfile.TemporaryDirectory(prefix="topd-bench-") as folder:
        path = Path(folder) / "report.json"
        command = [sys.executable, "-m", module, *arguments, "--worker", str(path)]
        process = subprocess.Popen(command, env=child_environment(malloc), stdout=subprocess.DEVNULL)
        status = _wait(process)
        if status not in (0, INTERRUPTED):
            note(f"error: {module} worker ended with status {status}, malloc {malloc}: {' '.join(arguments)}")
            status = 1
        return Outcome(json.loads(path.read_text()) if path.exists() else None, status)


def options(values: Mapping[str, object]) -> list[str]:
    """Return command-line options from a mapping: lists are repeated words, None is left out."""
    words: list[str] = []
    for name, value in values.items():
        if value is None:
            continue
        items = value if isinstance(value, list | tuple) else [value]
        words += [f"--{name.replace('_', '-')}", *map(str, items)]
    return words
