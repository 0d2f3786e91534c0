"""A few processes that work together over gloo: `start` runs a script in a process of its own, which calls `fork`.

Imports take longer than most scripts' work. So the scripts of a test run are forked from one process that has made them,
`rank_host.py`.
"""

import atexit
import json
import multiprocessing
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

TESTS = Path(__file__).parent


def start(script: str, folder: Path, timeout: float, ranks: int = 2, *, alone: bool = False) -> list[dict[str, Any]]:
    """Run a script below this folder in so many processes; return what it saved for each rank in `folder`.

    Args:
        timeout: seconds, after which all of them are killed.
        alone: not forked from the process that has made the imports, for what the environment decides at a process's start.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = _environment() | {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
    }
    command = [sys.executable, str(TESTS / script), str(folder)]
    if alone:
        subprocess.run(command, env=environment, check=True, timeout=timeout)
    else:
        output = folder / "output.txt"
        try:
            status = _host().status_of(command[1:], environment, output, timeout)
        finally:
            print(output.read_text() if output.exists() else "", end="", flush=True)
        if status:
            raise subprocess.CalledProcessError(status, command)
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]


def _environment() -> dict[str, str]:
    folders = os.pathsep.join(str(path) for path in (TESTS.parent / "python_api", TESTS, TESTS.parent))
    return os.environ | {"PYTHONPATH": folders}


class _Host:
    """The process that has made the imports, and forks a process for each script."""

    def __init__(self) -> None:
        command = [sys.executable, str(TESTS / "rank_host.py")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        environment = _environment() | {"OMP_NUM_THREADS": "1"}  # a fork in the middle of threads would hang
        self.process = subprocess.Popen(command, bufsize=0, env=environment, start_new_session=True, **pipes)
        atexit.register(self.end)

    def status_of(self, command: list[str], environment: dict[str, str], output: Path, timeout: float) -> int:
        """Return the exit status of a script; kill its processes where it takes longer."""
        ends = time.monotonic() + timeout
        request = {"command": command, "environment": environment, "output": str(output)}
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        try:
            pid = self._answer(ends, timeout)["pid"]
        except BaseException:  # the next script needs another one
            self.process.kill()
            _host.cache_clear()
            raise
        try:
            return self._answer(ends, timeout)["status"]
        except BaseException:
            os.killpg(pid, signal.SIGKILL)
            self._answer(ends + 10, timeout)
            raise

    def end(self) -> None:
        """Let it end, and wait for it."""
        self.process.stdin.close()
        self.process.wait(timeout=10)

    def _answer(self, ends: float, timeout: float) -> dict[str, int]:
        ready, *_ = select.select([self.process.stdout], [], [], max(0.0, ends - time.monotonic()))
        if not ready:
            raise subprocess.TimeoutExpired(self.process.args, timeout)
        return json.loads(self.process.stdout.readline())


_host = cache(_Host)


def fork(work: Callable[[int], dict[str, Any]]) -> None:
    """Save what work(rank) returns in the folder that the command names; exit with 1 where a rank fails."""
    context = multiprocessing.get_context("fork")
    running = [
        context.Process(target=_run, args=(work, rank, Path(sys.argv[1]))) for rank in range(int(os.environ["WORLD_SIZE"]))
    ]
    for process in running:
        process.start()
    for process in running:
        process.join()
    sys.exit(any(process.exitcode for process in running))


def fork_cases(*cases: Callable[[int], dict[str, Any]]) -> None:
    """Save what each of the functions returns, by its name; all ranks are one gloo group, and cases begin with one seed."""

    def work(rank: int) -> dict[str, Any]:
        torch.distributed.init_process_group("gloo")
        results = {}
        for case in cases:
            torch.manual_seed(0)
            results[case.__name__] = case(rank)
        return results

    fork(work)


def message(call: Callable[[], Any]) -> str:
    """Return the error of a call."""
    try:
        call()
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def _run(work: Callable[[int], dict[str, Any]], rank: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.save(work(rank), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()
