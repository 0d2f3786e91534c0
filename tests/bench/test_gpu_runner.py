"""The runner of `python -m topd_bench.gpu` with stand-in jobs: order, deadline, signals, lines as they come, deaths."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from topd_bench.runner import Job, Runner

ROOT = Path(__file__).parents[2]
SAY = """
import json, os, signal, sys, time
def say(name, **more):
    print(json.dumps({"table": "lines", "cells": [name], "row": {}, **more}), flush=True)
"""


def job(name: str, code: str, weight: float = 1.0) -> Job:
    return Job(name, [sys.executable, "-c", SAY + code], weight)


def run(*jobs: Job, seconds: float = 30.0) -> tuple[Runner, list[tuple[str, str]]]:
    """Return the runner, and each line's job and last word."""
    told: list[tuple[str, str]] = []
    runner = Runner(seconds, lambda name, record: told.append((name, record["cells"][-2 if record["table"] == "jobs" else 0])))
    runner.least = 0.5
    runner.run(jobs)
    return runner, told


def test_jobs_run_in_order_and_what_is_no_line_goes_to_stderr(capfd):
    code = "say('1'); print('hello'); print('[1]'); print('why', file=sys.stderr); say('2', failed=True)"
    runner, told = run(job("a", code), job("b", "say('3')"))
    assert told == [("a", "1"), ("a", "2"), ("a", "done"), ("b", "3"), ("b", "done")]
    assert (runner.failed, runner.signal) == (1, None)
    printed = capfd.readouterr()
    assert set(printed.err.splitlines()) == {"hello", "[1]", "why"}
    assert printed.out == ""


@pytest.mark.parametrize(
    ("code", "how"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "died: SIGSEGV: "),
        (
            "raise RuntimeError('CUDA error: an illegal memory access')",
            "died: exit status 1: RuntimeError: CUDA error: an ille",
        ),
    ],
)
def test_a_job_that_dies_is_a_line_and_not_the_end(code, how):
    runner, told = run(job("a", f"say('1'); {code}"), job("b", "say('2')"))
    assert [name for name, _ in told] == ["a", "a", "b", "b"]
    assert told[1][1].startswith(how)
    assert told[2:] == [("b", "2"), ("b", "done")]
    assert runner.failed == 1


def test_a_job_without_end_is_ended_with_its_children_and_the_rest_runs():
    """What it says on its way out is kept."""
    code = """
say('1')
try:
    time.sleep(60)
except KeyboardInterrupt:
    say('2')
"""
    began = time.monotonic()
    runner, told = run(job("a", code), job("b", "say(sys.argv[-1])"), seconds=4.0)
    assert told[:3] == [("a", "1"), ("a", "2"), ("a", "stopped: its time was used up")]
    assert told[3:] == [("b", "1"), ("b", "done")]  # told half of what is left
    assert time.monotonic() - began < 5.0
    assert runner.failed == 0


def test_a_job_that_hears_nothing_is_killed(monkeypatch):
    monkeypatch.setattr("topd_bench.runner.ENDING_SECONDS", 0.3)
    _, told = run(job("a", "signal.signal(signal.SIGINT, signal.SIG_IGN); say('1'); time.sleep(60)"), seconds=1.5)
    assert told == [("a", "1"), ("a", "stopped: its time was used up")]


def test_a_job_for_which_no_time_is_left_is_named():
    _, told = run(job("a", "time.sleep(60)", weight=1e3), job("b", "say('2')"), seconds=1.5)
    assert told == [("a", "stopped: its time was used up"), ("b", "skipped: the time is used up")]


DRIVER = """
import json, sys
from topd_bench.runner import Job, Runner
lines = [sys.executable, "-c", '''
import json, sys, time
for i in range(1000):
    print(json.dumps({"table": "lines", "cells": [str(i)], "row": {}}), flush=True)
    time.sleep(0.05)
''']
runner = Runner(60.0, lambda name, record: print(json.dumps([name, *record["cells"]]), flush=True))
runner.run([Job("a", lines, 1.0), Job("b", lines, 1.0)])
print(json.dumps([runner.signal]), flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_job_and_the_run_and_lines_came_before_it(number):
    process = subprocess.Popen([sys.executable, "-c", DRIVER], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    first = json.loads(process.stdout.readline())
    assert first == ["a", "0"]  # while the job still runs
    process.send_signal(number)
    rest, _ = process.communicate(timeout=20)
    lines = [json.loads(line) for line in rest.splitlines()]
    assert lines[-2][:3] == ["a", "a", f"stopped: {signal.Signals(number).name}"]
    assert lines[-1] == [int(number)]
    assert [line[1] for line in lines[:-2]] == [str(i) for i in range(1, len(lines) - 1)]
    assert process.returncode == 0
