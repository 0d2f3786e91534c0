"""The process from which the tests' ranks are forked: it has imported what their scripts import, and does nothing else.

Imports take longer than most scripts' work, so they are made once for all scripts of a test run. `two_ranks.start` writes one
request a line to the standard input; for each the host answers with the pid of the process that runs the script, and with its
exit status. At the end of its input the host ends, and what still runs ends with it.
"""

import gc
import importlib
import json
import os
import runpy
import select
import signal
import sys
from contextlib import suppress
from typing import Any, NoReturn

# What torch, at the first call of an operator, and transformers, for a model, would import in every rank anew.
OPERATORS = "torch.fx.experimental.symbolic_shapes"
MODELS = ("LlamaForCausalLM", "Qwen3ForCausalLM")


def main() -> None:
    """Serve requests until the input ends."""
    for line in iter(sys.stdin.buffer.raw.readline, b""):
        request = json.loads(line)
        sys.argv = request["command"]
        preload(sys.argv[0])
        gc.collect()
        gc.freeze()  # or a collection in a rank would copy the memory of the imports
        pid = os.fork()
        if pid == 0:
            run(request)
        with suppress(ProcessLookupError, PermissionError):
            os.setpgid(pid, pid)
        say({"pid": pid})
        say({"status": os.waitstatus_to_exitcode(status_of(pid))})
    os._exit(0)


def preload(script: str) -> None:
    """Import what a script imports; an error is told by the run itself."""
    sys.path.insert(0, os.path.dirname(script))  # as Python itself does
    try:
        runpy.run_path(script, run_name="preload")
        importlib.import_module(OPERATORS)
        if "transformers" in sys.modules:
            for name in MODELS:
                getattr(sys.modules["transformers"], name)
    except Exception:
        pass


def run(request: dict[str, Any]) -> NoReturn:
    """Run a script as its own process would, with its output in a file."""
    os.setpgid(0, 0)
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream, target in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, output)):
        os.dup2(target, stream)
    os.environ.clear()
    os.environ.update(request["environment"])
    status = 1
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as ending:
        status = int(ending.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def status_of(pid: int) -> int:
    """Wait for a process; end it where the input ends first."""
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        if select.select([0], [], [], 0.02)[0]:
            os.killpg(pid, signal.SIGKILL)
            os._exit(1)


def say(answer: dict[str, int]) -> None:
    os.write(1, json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    main()
