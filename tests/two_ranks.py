"""A few processes that work together over gloo: `start` runs a script in a process of its own, which calls `fork`.

A script's imports take longer than its work: they run once, before the fork.
"""

import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

TESTS = Path(__file__).parent


def start(script: str, folder: Path, timeout: float, ranks: int = 2) -> list[dict[str, Any]]:
    """Run a script below this folder in so many processes; return what it saved for each rank in `folder`."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    folders = os.pathsep.join(str(path) for path in (TESTS.parent / "python_api", TESTS, TESTS.parent))
    environment = os.environ | {
        "PYTHONPATH": folders,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
    }
    subprocess.run([sys.executable, str(TESTS / script), str(folder)], env=environment, check=True, timeout=timeout)
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]


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
