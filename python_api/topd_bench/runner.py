"""Run jobs one after the other, each in a process of its own, and hand on every line of theirs as it comes.

A job is a command that writes its lines to stdout, a JSON object each. Whatever happens to it becomes a line too: a fault of
the device, which ends a process, costs that job alone. All of them share the seconds of the run; a signal ends the one that
runs, and what it has written until then is kept.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from topd_bench.report import strict

Record = dict[str, Any]
Sink = Callable[[str, Record], None]
SIGNALS = (signal.SIGTERM, signal.SIGINT)
# What a job is told is so many seconds less than its part of the time, half of it at least; it may take OVERRUN times its part.
SPARE_SECONDS, OVERRUN = 15.0, 1.5
ENDING_SECONDS, LEAST_SECONDS = 5.0, 10.0
USED_UP = "its time was used up"


class Job(NamedTuple):
    """A name, a command, to which `--seconds` is added, its part of the run's time, in units that all jobs share, and its
    environment (None: this process's)."""

    name: str
    command: Sequence[str]
    weight: float
    environment: Mapping[str, str] | None = None


class Runner:
    """A run of jobs.

    Attributes:
        failed: how many lines told of a failure so far, among them those on jobs that died.
        signal: the signal that has ended the run, or None.
        seconds: what the run has taken, once it is over.
    """

    def __init__(self, seconds: float, sink: Sink, *, least: float = LEAST_SECONDS) -> None:
        self.began = time.monotonic()
        self.end, self.sink, self.least = self.began + seconds, sink, least
        self.failed, self.seconds = 0, 0.0
        self.signal: int | None = None
        # Lines of the job that runs; None after the last, and where a signal asks the run to end.
        self.lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def run(self, jobs: Sequence[Job]) -> None:
        """Run the jobs in their order; hand every line, and one on the end of each job, to the sink.

        SIGTERM and SIGINT end the job that runs and the run. Time that a job leaves is for the jobs after it. One that is left
        less than `least` seconds is not started.
        """
        before = {number: signal.signal(number, self._signalled) for number in SIGNALS}
        try:
            for index, job in enumerate(jobs):
                if self.signal is not None:
                    break
                left = self.end - time.monotonic()
                share = left * job.weight / sum(each.weight for each in jobs[index:])
                if share < self.least:
                    self._tell(job, "skipped: the time is used up")
                else:
                    self._run_job(job, share, min(left, OVERRUN * share))
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self.seconds = time.monotonic() - self.began

    def _signalled(self, number: int, frame: object) -> None:
        """Note a signal and wake the run up. Nothing is raised, so that no line is cut in two."""
        self.signal = self.signal or number
        self.lines.put(None)

    def _tell(self, job: Job, how: str, seconds: float = 0.0, *, failed: bool = False) -> None:
        """Hand on the line on the end of a job."""
        row = {"how": how, "seconds": round(seconds, 1)}
        self._hand_on(job, {"table": "jobs", "cells": [job.name, how, f"{seconds:.0f}"], "row": row, "failed": failed})

    def _hand_on(self, job: Job, record: Record) -> None:
        self.failed += bool(record.get("failed"))
        self.sink(job.name, record)

    def _run_job(self, job: Job, share: float, limit: float) -> None:
        """Run a job for `limit` seconds at most, of which it is told its share, less what it may need to come to its end."""
        began, told = time.monotonic(), max(share - SPARE_SECONDS, share / 2, 1.0)
        self.lines = queue.SimpleQueue()
        process = subprocess.Popen(
            [*job.command, "--seconds", f"{told:.0f}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=job.environment,
            start_new_session=True,
        )
        last_words = [""]
        threading.Thread(target=_read, args=(process.stdout, self.lines.put), daemon=True).start()
        echo = threading.Thread(target=_echo, args=(process.stderr, last_words), daemon=True)
        echo.start()
        closed = self._take(job, began + limit)
        if closed and self.signal is None:  # it has closed its stdout: it ends by itself
            with suppress(subprocess.TimeoutExpired):
                process.wait(ENDING_SECONDS)
        stopped = process.poll() is None or self.signal is not None
        _end(process)
        if not closed or self.signal is not None:
            self._take(job, time.monotonic() + 1.0)  # what it has written at its end
        echo.join(1.0)
        if stopped:
            why = USED_UP if self.signal is None else signal.Signals(self.signal).name
            self._tell(job, f"stopped: {why}", time.monotonic() - began)
        elif process.returncode:
            self._tell(job, f"died: {_status(process.returncode)}: {last_words[0]}", time.monotonic() - began, failed=True)
        else:
            self._tell(job, "done", time.monotonic() - began)

    def _take(self, job: Job, end: float) -> bool:
        """Hand on lines until there are no more, which is True, or the time is over."""
        while True:
            try:
                text = self.lines.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                return False
            if text is None:
                return True
            try:
                record = json.loads(text)
            except ValueError:
                record = None
            if isinstance(record, dict) and "table" in record:
                self._hand_on(job, record)
            elif text.strip():
                sys.stderr.write(text.rstrip() + "\n")  # in one call: two threads write there


def speak(records: Iterable[Record]) -> None:
    """Write records as a job does, from inside it: each a line on stdout at once; whatever else prints there goes to stderr."""
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for record in records:
        lines.write(json.dumps(strict(record)) + "\n")
        lines.flush()


def _read(stream: Any, put: Callable[[str | None], None]) -> None:
    """Queue a job's lines."""
    for line in stream:
        put(line)
    put(None)


def _echo(stream: Any, last_words: list[str]) -> None:
    """Show what a job says, and keep its last line."""
    for line in stream:
        sys.stderr.write(line.rstrip("\n") + "\n")
        last_words[0] = line.strip()[:200] or last_words[0]


def _end(process: "subprocess.Popen[str]") -> None:
    """End a job that still runs, and what it has started: asked first, as by Ctrl-C, and killed where it does not answer."""
    for number in (signal.SIGINT, signal.SIGKILL):
        if process.poll() is not None:
            return
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(ENDING_SECONDS)


def _status(code: int) -> str:
    """Return an exit status in words."""
    return signal.Signals(-code).name if code < 0 else f"exit status {code}"
