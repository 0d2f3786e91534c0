"""`pytest -m gpu` in a process of its own: what failed, and the last line of each run."""

import importlib.util
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from topd_bench.gpu.clock import Budget
from topd_bench.gpu.lines import NOT_INSTALLED
from topd_bench.gpu.report import plain
from topd_bench.report import note
from topd_bench.runner import Record

ROOT = Path(__file__).parents[3]
TESTS = Path("tests", "kernels")
FOLDERS = ("tests/kernels", "tests/losses", "tests/near_future", "tests/ops")
MOST_FAILURES = 20
# Behind `nohup` or in a script's background SIGINT is ignored, which a child inherits: then nothing would end it in time.
PYTEST = """
import signal, sys, pytest
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(pytest.main(sys.argv[1:]))
"""
OPTIONS = ("-m", "gpu", "-q", "--tb=line", "-p", "no:cacheprovider", "--continue-on-collection-errors", "--no-header")


def all_lines(seconds: float) -> Iterator[Record]:
    """Yield the tests at the widths of models, then all others."""
    if not (ROOT / TESTS).is_dir():
        yield plain("tests", "all", "skipped: the tests are in a clone of the repository, not in the package")
        return
    first = sorted(str(path.relative_to(ROOT)) for path in (ROOT / TESTS).glob("test_gpu_*.py"))
    budget = Budget(seconds, 2)
    yield from pytest_lines("widths of models", first, budget.share())
    ignored = [f"--ignore={path}" for path in first]
    yield from pytest_lines("all others", [*FOLDERS, *ignored], budget.share())


def pytest_lines(what: str, arguments: Sequence[str], seconds: float) -> Iterator[Record]:
    """Yield the tests that failed, and a last line on how many passed; as many as ran where the time is used up."""
    if importlib.util.find_spec("pytest") is None:
        yield plain("tests", what, NOT_INSTALLED)
        return
    note(f"pytest -m gpu, {what}")
    command = [sys.executable, "-u", "-c", PYTEST, *OPTIONS, *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    stopped = threading.Event()

    def stop() -> None:
        stopped.set()
        process.send_signal(signal.SIGINT)  # pytest then says how many have passed so far

    timer = threading.Timer(seconds, stop)
    timer.start()
    summary, failures = "pytest said nothing", 0
    try:
        for line in process.stdout or ():
            text = line.strip()
            note(text)
            summary = text or summary
            if text.startswith(("FAILED ", "ERROR ")):
                failures += 1
                if failures <= MOST_FAILURES:
                    yield plain("tests", what, text[:200], failed=True)
        status = process.wait()
    finally:
        timer.cancel()
        if process.poll() is None:
            process.kill()
    if stopped.is_set():
        yield plain("tests", what, f"stopped, its time was used up: {summary}", failed=failures > 0)
    else:
        yield plain("tests", what, f"{summary} (exit status {status})", failed=status not in (0, NO_TESTS))


NO_TESTS = 5
