"""A job of `topd bench` in a fresh process: `python -m topd_bench.worker REQUEST`, which writes its rows to stdout as JSON."""

import argparse
import importlib
import sys
from collections.abc import Iterator, Sequence

import torch

from topd.backends import choose_backend
from topd.cli.errors import INTERRUPTED
from topd_bench.catalogue import CASES
from topd_bench.machine import cpu_facts
from topd_bench.records import facts_record
from topd_bench.request import Request
from topd_bench.runner import Record, speak


def records(request: Request) -> Iterator[Record]:
    """Yield the machine's facts, then the rows."""
    backend = choose_backend(request.backend, torch.device("cpu"))
    yield facts_record(cpu_facts(backend, request.malloc))
    yield from importlib.import_module(f"topd_bench.{CASES[request.case].module}").work(request)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; the exit status is 130 after an interrupt."""
    parser = argparse.ArgumentParser(prog="python -m topd_bench.worker", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("request", type=Request.read)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)  # of the runner, whose time has no end here
    try:
        speak(records(parser.parse_args(argv).request))
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
