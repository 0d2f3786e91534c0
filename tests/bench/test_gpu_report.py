"""What `python -m bench.gpu` prints and writes, how it ends, and that it says in one line that there is no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu_bench import CPU

from bench.gpu import command
from bench.gpu.kernels import KernelRow
from bench.gpu.report import Report, header_lines
from bench.gpu.times import TimeRow
from bench.gpu.tune import TuneRow
from bench.machine import gpu_facts
from bench.timing import Spread

ROOT = Path(__file__).parents[2]
SPREAD = Spread(2.0, 1.0, 3.0)


def test_says_that_there_is_no_gpu(tmp_path):
    hidden = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "PYTHONPATH": f"{ROOT / 'python_api'}:{ROOT}"}
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | hidden
    line = [sys.executable, "-m", "bench.gpu", "--quick", "--json", str(tmp_path / "gpu.json")]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 2
    assert done.stderr == "no GPU: torch sees no CUDA or ROCm device on this machine; nothing was timed\n"
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def fill(report: Report, *, ok: bool = True) -> None:
    place = ("qwen", 8192, "frozen", "jsd")
    report.times.append(TimeRow(*place, "trl", SPREAD, SPREAD, SPREAD, 20.0, 123.4, 1e-4, 2e-3, 3e-3, "a note"))
    if not ok:
        report.times.append(TimeRow(*place, "ours", note="wrong"))
    report.kernels.append(KernelRow("divergence_rows", "sweep", SPREAD, 4_000_000_000, 0.6))
    report.tuned.append(TuneRow("divergence_rows", "sweep", "BLOCK=1024", SPREAD, "BLOCK=512", SPREAD, 12, 1))
    report.copy_gbs = 3000.0


def test_tables_hold_what_was_measured():
    report = Report({"device": "a GPU", "HIP": None})
    fill(report)
    text = report.tables()
    words = (
        "2.00 (1.00-3.00)",
        "| 10000   | 123      | 1.0e-04     | 2.0e-03        | 3.0e-03        | a note |",
        "a copy moves 3000 GB/s",
        "2.000 (1.000-3.000)",
        "| 2000 | 60%",
        "BLOCK=512",
        "12, 1 failed",
    )
    assert [word for word in words if word not in text] == []
    assert "not timed" not in text
    fill(report, ok=False)
    assert "Wrong or failed, and not timed: 1" in report.tables()
    assert header_lines(report.machine) == "device: a GPU"


@pytest.mark.parametrize(
    ("ok", "error", "status"),
    [(True, None, 0), (False, None, 1), (True, RuntimeError("lost the device"), 1), (True, KeyboardInterrupt(), 130)],
)
def test_main_prints_writes_and_exits(ok, error, status, monkeypatch, tmp_path, capsys):
    def run(report, arguments, device):
        fill(report, ok=ok)
        if error is not None:
            raise error

    monkeypatch.setattr(command, "refusal", lambda: None)
    monkeypatch.setattr(command, "gpu_facts", lambda device: {"device": "a GPU"})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(command, "run", run)
    path = tmp_path / "gpu.json"
    assert command.main(["--json", str(path)]) == status
    printed = capsys.readouterr().out
    assert printed.startswith("device: a GPU\n")
    assert "### kernels" in printed
    written = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert written["complete"] == (error is None)
    assert written["failed"] == (not ok)
    assert written["times"][0]["time_ms"] == {"median": 2.0, "low": 1.0, "high": 3.0}
    assert written["kernels"][0]["moved_bytes"] == 4_000_000_000
    assert written["tuned"][0]["failed"] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_quick_is_one_shape():
    plan = command.plan_of(command.parser().parse_args(["--quick", "--n", "512"]))
    assert [(case.name, case.n) for case in plan.shapes] == [("qwen3-4b from qwen3-30b-a3b", 512)]
    assert plan.lines == 4
    whole = command.plan_of(command.parser().parse_args([]))
    assert whole.lines == 3 * (4 * 2 + 1) + 1


def test_first_lines_are_facts():
    facts = gpu_facts(CPU)
    assert {"device", "torch", "triton", "CUDA", "HIP", "commit"} <= set(facts)
    assert header_lines(facts).startswith("device: ")
