"""Servers and clients that are killed: every problem ends up with one record, and no finished one is asked for again."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from topd.trd import read_run, summary

pytest.importorskip("openai")
HERE = Path(__file__).parent
ROOT = HERE.parents[1]


class ServerProcess:
    """The server as a process; `kill` ends it in the middle of whatever it does, `start` brings it back at the same port."""

    def __init__(self, log: Path, delay: float) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log, self.delay = log, delay
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-S", str(HERE.parent / "local_server.py"), str(self.port), str(self.log), str(self.delay)]
        self.process = subprocess.Popen(command)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.01)
        raise TimeoutError("the server does not listen")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def asked(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def server(tmp_path):
    process = ServerProcess(tmp_path / "requests.log", 0.03)
    yield process
    process.kill()


@pytest.fixture(scope="module")
def clients():
    """Run a client to its end: order -> exit code."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "python_api"), str(ROOT)])}
    command = [sys.executable, str(HERE / "forked_clients.py")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdin is not None
    assert process.stdout is not None

    def run(**order) -> int:
        process.stdin.write(json.dumps({"answers": None, "seconds": 0, "signal": signal.SIGKILL, **order}) + "\n")
        process.stdin.flush()
        return int(process.stdout.readline())

    yield run
    process.stdin.close()
    process.wait()


def finished(path: Path) -> set[str]:
    """Return the problems that have a record, by the name by which the server notes them."""
    written = path.exists() and path.read_bytes().count(b"\n")
    return {" ".join(record["problem"].split()[:2]) for record in read_run(path)[1]} if written else set()


@pytest.mark.slow
def test_two_hundred_problems_survive_two_kills_of_the_server_and_twenty_of_the_client(tmp_path, server, clients):
    """Among them are refusals, empty answers, and problems whose first two requests meet a storm of 429."""
    words = {0: "REFUSE", 1: "EMPTY", 2: "STORM 2 after 0.02", 3: "STATUS 400"}
    problems = [{"id": number, "problem": f"problem {number} {words.get(number % 10, '')}"} for number in range(200)]
    order = {"url": f"http://127.0.0.1:{server.port}/v1", "problems": problems, "path": str(tmp_path / "run.jsonl")}
    moments, asked_later = random.Random(5), []
    for _ in range(20):
        code = clients(**order, answers=moments.randrange(8), seconds=moments.uniform(0, 0.03))
        assert code == -signal.SIGKILL
        asked_later.append((finished(tmp_path / "run.jsonl"), len(server.asked())))
    before_restarts = len(server.asked())
    assert 20 < len(finished(tmp_path / "run.jsonl")) < 180

    def restart_twice() -> None:
        deadline = time.monotonic() + 30
        for more in (10, 20):
            while len(server.asked()) < before_restarts + more and time.monotonic() < deadline:
                time.sleep(0.005)
            server.kill()
            server.start()

    restarts = threading.Thread(target=restart_twice)
    restarts.start()
    assert clients(**order) == 0
    restarts.join()

    records = list(read_run(tmp_path / "run.jsonl")[1])
    assert Counter(record["id"] for record in records) == {str(number): 1 for number in range(200)}
    expected = {0: "refused", 1: "empty", 3: "refused"}
    assert all(record["status"] == expected.get(int(record["id"]) % 10, "ok") for record in records)
    asked = server.asked()
    for done, before in asked_later:
        assert not done & set(asked[before:])
    storms = range(2, 200, 10)  # whose first two requests may have been those of clients that were killed
    assert all(Counter(asked)[f"problem {number}"] >= 3 for number in storms)
    attempts = sum(record["attempts"] for record in records)
    assert attempts > 200 + len(storms) / 2  # of the storms, and of what was in flight when the server died
    done = summary(tmp_path / "run.jsonl")
    assert (done.statuses, done.attempts) == ({"ok": 160 - 20, "refused": 40, "empty": 20}, attempts)


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_ctrl_c_and_sigterm_end_a_run_between_two_records(tmp_path, server, clients, sent, code):
    problems = [{"problem": f"problem {number}"} for number in range(80)]
    order = {"url": f"http://127.0.0.1:{server.port}/v1", "problems": problems, "path": str(tmp_path / "run.jsonl")}
    assert clients(**order, answers=5, seconds=0.02, signal=sent) == code
    text = (tmp_path / "run.jsonl").read_bytes()
    assert text.endswith(b"}\n")
    assert 5 <= text.count(b"\n") < 81
    assert clients(**order) == 0
    assert len(finished(tmp_path / "run.jsonl")) == 80
