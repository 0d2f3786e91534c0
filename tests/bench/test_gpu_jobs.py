"""The jobs of `python -m topd_bench.gpu` on tiny shapes, in Triton's interpreter, and its run of pytest on a file."""

import importlib.util
import json
import signal
from types import SimpleNamespace

import pytest
import torch
from gpu_bench import CASE, CPU, INTERPRETED

from topd_bench.gpu import clock, correctness, jobs, lines, rates, times, tune
from topd_bench.gpu.jobs import JOBS, Run
from topd_kernels.shared import blocks


@pytest.fixture
def run(monkeypatch):
    """Tiny sizes, and neither TRL nor Liger nor POT."""
    installed = importlib.util.find_spec
    libraries = ("trl", "liger_kernel", "ot")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in libraries else installed(name))
    monkeypatch.setattr(jobs, "TRANSPORT", (2, 4, 8))
    monkeypatch.setattr(jobs, "IDS", 3)
    monkeypatch.setattr(jobs, "KERNEL_ROUNDS", 1)
    monkeypatch.setattr(jobs, "COMPILE_SECONDS", 1e9)
    monkeypatch.setattr(rates, "CHUNK_ROWS", (1,))
    monkeypatch.setattr(times, "MIN_ROUNDS", 1)
    monkeypatch.setattr(clock.DeviceClock, "copy_bandwidth", lambda self: 1e9)
    return Run(CPU, (CASE,), 1, 600.0)


def rows_of(run: Run, name: str) -> list[dict]:
    return [line | {"row": json.loads(json.dumps(line["row"]))} for line in JOBS[name].lines(run)]


@INTERPRETED
def test_the_device(run):
    lines_of = rows_of(run, "device")
    facts = [line["cells"][0] for line in lines_of if line["table"] == "facts"]
    assert {"torch", "triton", "backend triton"} <= set(facts)
    assert [line["cells"][0] for line in lines_of if line["table"] == "rates"] == [
        "copy", "floor's logits", *["logits", "d hidden", "d weight"] * 2,
    ]  # fmt: skip


@INTERPRETED
def test_losses_beside_the_floor(run):
    rows = [line["row"] for line in rows_of(run, "losses")]
    assert [row["loss"] for row in rows[::3]] == ["reverse_kl", "jsd", "logprobs_1", "logprobs_50", "reverse_kl"]
    assert [row["contender"] for row in rows[:3]] == ["floor", "ours", "ours, 512 MiB"]
    assert all(row["time_ms"] for row in rows)


@INTERPRETED
def test_peers_that_are_missing_are_skipped(run):
    rows = [line["row"] for line in rows_of(run, "peers")]
    skipped = {(row["loss"], row["contender"]) for row in rows if row["note"].startswith(lines.NOT_INSTALLED)}
    known = {(loss, name) for loss in ("reverse_kl", "jsd", "logprobs_1") for name in ("trl", "liger")}
    assert skipped == known | {("transport, largest row error", "ot.batch")}
    assert [row for row in rows if row["contender"] == "ours" and row["time_ms"] is None] == []


@INTERPRETED
def test_each_kernel_has_its_line(run):
    rows = rows_of(run, "kernels")
    assert not [line for line in rows if line["failed"]]
    assert {line["cells"][1] for line in rows} >= {"statistics", "sweep, gradient", "gather", "scatter", "rest"}


@INTERPRETED
def test_tuning_keeps_what_it_is_asked_to(run, monkeypatch, tmp_path):
    monkeypatch.setattr(blocks.Path, "home", lambda: tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name="A GPU"))
    monkeypatch.setattr(tune, "best_sizes", lambda rows: {row.key: blocks.Sizes(512, 2) for row in rows if row.key})
    monkeypatch.setattr(tune, "BLOCKS", (512,))
    monkeypatch.setattr(tune, "WARPS", (2,))
    monkeypatch.setattr(tune, "TUNED", ("gather",))
    assert [line["table"] for line in rows_of(run, "tuning")] == ["tuned"]
    assert list(tmp_path.iterdir()) == []
    keep = Run(CPU, (CASE,), 1, 600.0, keep=True)
    path = blocks.file_of("A GPU")
    assert rows_of(keep, "tuning")[-1]["cells"] == ["block sizes kept", f"{path}: gather 2"]
    assert blocks.read(path, "A GPU") == {"gather 2": (512, 2)}


TESTS = """
import time
import pytest
pytestmark = pytest.mark.gpu
def test_right(): pass
def test_wrong(): assert 1 == 2
def test_long(): time.sleep({seconds})
"""


@pytest.fixture
def tests_of(tmp_path, monkeypatch):
    monkeypatch.setattr(correctness, "ROOT", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs a GPU\n")

    def lines_of(seconds: float, allowed: float) -> list[dict]:
        (tmp_path / "test_it.py").write_text(TESTS.format(seconds=seconds))
        return list(correctness.pytest_lines("it", ["test_it.py"], allowed))

    return lines_of


def test_pytest_is_a_summary_and_its_failures(tests_of):
    failure, summary = tests_of(0.0, 60.0)
    assert failure["cells"][1].startswith("FAILED test_it.py::test_wrong")
    assert failure["failed"]
    assert summary["cells"][1].startswith("1 failed, 2 passed in ")
    assert summary["cells"][1].endswith(" (exit status 1)")
    assert summary["failed"]


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN])
def test_pytest_that_takes_too_long_says_how_far_it_came(tests_of, handler):
    """Also where this process ignores SIGINT, as behind nohup."""
    before = signal.signal(signal.SIGINT, handler)
    try:
        *_, summary = tests_of(30.0, 3.0)
    finally:
        signal.signal(signal.SIGINT, before)
    assert summary["cells"][1].startswith("stopped, its time was used up: 1 failed, 1 passed")


def test_the_widths_of_models_come_first_and_all_others_after(monkeypatch):
    asked = []
    monkeypatch.setattr(correctness, "pytest_lines", lambda what, arguments, seconds: asked.append((what, arguments)) or [])
    assert [*correctness.all_lines(9.0)] == []
    words = dict(asked)
    assert list(words) == ["widths of models", "all others"]
    first = words["widths of models"]
    assert first
    assert all(path.startswith("tests/kernels/test_gpu_") for path in first)
    assert words["all others"] == [*correctness.FOLDERS, *(f"--ignore={path}" for path in first)]


def test_without_pytest_its_line_says_so(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert [line["cells"] for line in correctness.pytest_lines("it", [], 1.0)] == [["it", "skipped: not installed"]]
