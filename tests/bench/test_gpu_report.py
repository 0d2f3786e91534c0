"""What `python -m topd_bench.gpu` prints and writes, how it ends, and that it says in one line that there is no GPU."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_bench import CPU

from topd_bench.gpu import command
from topd_bench.gpu.jobs import JOBS
from topd_bench.gpu.kernels import KernelRow
from topd_bench.gpu.report import Report, plain, record
from topd_bench.gpu.times import TimeRow
from topd_bench.gpu.tune import TuneRow
from topd_bench.machine import gpu_facts
from topd_bench.runner import Runner
from topd_bench.timing import Spread

ROOT = Path(__file__).parents[2]
SPREAD = Spread(2.0, 1.0, 3.0)


def test_says_that_there_is_no_gpu(tmp_path):
    hidden = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "PYTHONPATH": "python_api:."}
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | hidden
    line = [sys.executable, "-m", "topd_bench.gpu", "--quick", "--json", str(tmp_path / "gpu.jsonl")]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 2
    assert done.stderr == "no GPU: torch sees no CUDA or ROCm device on this machine; nothing was timed\n"
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


PLACE = ("qwen", 8192, "frozen", "jsd")
LINES = [
    plain("facts", "torch", "2.13"),
    record("times", TimeRow(*PLACE, "trl", SPREAD, SPREAD, SPREAD, 20.0, 123.4, float("nan"), 2e-3, 3e-3, "a note")),
    record("kernels", KernelRow("divergence_rows", "sweep", SPREAD, 4_000_000_000, 1.0, None)),
    record("tuned", TuneRow("divergence_rows", "sweep", "BLOCK=1024", SPREAD, "BLOCK=512", SPREAD, 12, 1)),
]


def test_lines_are_printed_and_written_as_they_come(tmp_path, capsys):
    path = tmp_path / "gpu.jsonl"
    report = Report(path)
    written = []
    for line in LINES:
        report.add("losses", line)
        text = path.read_text().splitlines()
        written.append(json.loads(text[-1], parse_constant=pytest.fail))
        assert len(text) == len(written)
        assert capsys.readouterr().out.splitlines()[-1] == "| " + " | ".join(line["cells"]) + " |"
    assert [entry["table"] for entry in written] == ["facts", "times", "kernels", "tuned"]
    assert written[1]["time_ms"] == {"median": 2.0, "low": 1.0, "high": 3.0}
    assert written[1]["value_error"] == "nan"
    assert written[2] | {"job": "losses", "issue_ms": None, "over_floor": 2.0, "failed": False} == written[2]
    cells = LINES[1]["cells"]
    assert cells[5:] == ["2.00 (1.00-3.00)"] * 3 + ["10000", "123", "nan", "2.0e-03", "3.0e-03", "a note"]
    assert LINES[2]["cells"][2:] == ["2.000 (1.000-3.000)", "3814.7", "2000", "1.000", "-", "2.00", ""]
    assert LINES[3]["cells"][-1] == "12, 1 failed"


def test_tables_have_their_heads_and_jobs_their_ends(capsys):
    report = Report(None)
    for line in (LINES[0], LINES[0]):
        report.add("device", line)
    report.add("device", {"table": "jobs", "cells": ["device", "done", "3"], "row": {}})
    assert capsys.readouterr().out == (
        "\n### device\n| fact | value |\n| --- | --- |\n| torch | 2.13 |\n| torch | 2.13 |\n\ndevice: done, 3 s\n"
    )


@pytest.mark.parametrize(
    ("failed", "ended", "status"), [(False, None, 0), (True, None, 1), (False, signal.SIGINT, 130), (True, signal.SIGTERM, 143)]
)
def test_main_prints_writes_and_exits(failed, ended, status, monkeypatch, tmp_path, capsys):
    ran = []

    def run(self, jobs):
        ran.extend(jobs)
        for line in LINES:
            self._hand_on(jobs[0], line)
        if failed:
            self._hand_on(jobs[0], record("times", TimeRow(*PLACE, "ours", note="wrong")))
        self.signal = ended

    monkeypatch.setattr(command, "refusal", lambda: None)
    monkeypatch.setattr(Runner, "run", run)
    path = tmp_path / "gpu.jsonl"
    assert command.main(["--json", str(path), "--n", "64"]) == status
    assert [job.name for job in ran] == list(JOBS)
    assert list(ran[0].command[1:]) == ["-m", "topd_bench.gpu", "--json", str(path), "--n", "64", "--job", "device"]
    how = "complete" if ended is None else f"broken off: {signal.Signals(ended).name}"
    assert capsys.readouterr().out.endswith(f"\n{how}, 0 s, wrong or failed: {int(failed)}\n")
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert written[0] == {"benchmark": "gpu", "arguments": ["--json", str(path), "--n", "64"]}
    assert written[-1] == {"how": how, "seconds": 0.0, "failed": int(failed)}
    assert list(tmp_path.iterdir()) == [path]


JOB = """
import os, sys, torch
from topd_bench.gpu import command, jobs
from topd_bench.gpu.report import plain
def lines(run):
    print("a library prints")
    os.system("echo its child too")
    yield plain("facts", "seconds", str(run.seconds))
    raise RuntimeError("CUDA error: an illegal memory access")
torch.cuda.current_device = lambda: 0
jobs.JOBS["device"] = jobs.Work(lines, 30)
command.main(["--job", "device", "--seconds", "600", "--seconds", "20"])
"""


def test_a_job_keeps_its_stdout_for_lines():
    """The runner adds its seconds to those of the command line; the last count."""
    environment = os.environ | {"PYTHONPATH": "python_api:."}
    done = subprocess.run([sys.executable, "-c", JOB], capture_output=True, text=True, cwd=ROOT, env=environment)
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["cells"] == ["seconds", "20"]
    assert done.returncode == 1
    words = done.stderr.splitlines()
    assert {"a library prints", "its child too"} <= set(words)
    assert words[-1] == "RuntimeError: CUDA error: an illegal memory access"


def test_the_order_is_what_must_not_be_missing_first():
    assert list(JOBS) == ["device", "losses", "kernels", "tests", "peers", "tuning"]
    assert sum(work.seconds for work in JOBS.values()) <= 540


def arguments_of(*words: str):
    return command.parser().parse_args(words)


def test_what_the_words_ask_for():
    quick = arguments_of("--quick", "--n", "512")
    run = command.run_of(quick, CPU)
    assert [(case.name, case.n) for case in run.shapes] == [("qwen3-8b from qwen3-14b", 512)]
    assert command.names_of(quick) == ["device", "losses", "kernels"]
    whole = arguments_of()
    assert [case.n for case in command.run_of(whole, CPU).shapes] == [8192] * 4
    assert (whole.json, command.seconds_of(whole)) == (Path("gpu.jsonl"), 500)
    assert command.names_of(arguments_of("--jobs", "tuning", "device")) == ["device", "tuning"]
    tune = arguments_of("--tune", "--seconds", "60")
    assert command.names_of(tune) == ["device", "tuning"]
    assert command.run_of(tune, CPU).keep
    assert not command.run_of(whole, CPU).keep


def test_first_lines_are_facts():
    assert {"device", "torch", "triton", "CUDA", "HIP", "commit"} <= set(gpu_facts(CPU))
