"""Clients in processes that are forked from this one, so that imports are paid once: a JSON line in, one line out for each.

A line {"url", "problems", "path", "answers", "seconds", "signal"} becomes a process that runs `generate`; what comes back is
its exit code, negative for the signal that ended it. After so many answers and then seconds the process sends itself the
signal; with "answers" null it does not.
"""

import json
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

from topd.trd import FromServer, generate


class Killed(FromServer):
    """A server whose client ends itself."""

    def __init__(self, order: dict) -> None:
        super().__init__(order["url"], "model", concurrency=4, retries=12, backoff=0.02)
        self.order = order

    def answers(self, requests):
        if self.order["answers"] == 0:
            threading.Thread(target=self.kill, daemon=True).start()
        for number, answer in enumerate(super().answers(requests), 1):
            if self.order["answers"] == number:
                threading.Thread(target=self.kill, daemon=True).start()
            yield answer

    def kill(self) -> None:
        time.sleep(self.order["seconds"])
        os.kill(os.getpid(), self.order["signal"])


def client(order: dict) -> None:
    generate(order["problems"], Killed(order), order["path"], progress=False)


# A shell that starts tests in the background lets them ignore Ctrl-C, and their children too.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Nobody listens there: what the client imports when it first asks is imported now.
with tempfile.TemporaryDirectory() as folder:
    nobody = FromServer("http://127.0.0.1:9/v1", "model", retries=0)
    generate([{"problem": ""}], nobody, Path(folder) / "run.jsonl", progress=False)

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            client(json.loads(line))
            code = 0
        except KeyboardInterrupt:
            code = 130
        except SystemExit as stop:
            code = stop.code
        finally:
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
