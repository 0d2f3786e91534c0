"""A stand-in for the process of a job of `topd bench`, which measures nothing, for the tests of its runs."""

import sys

CODE = """
import json, os, signal, sys, time
request = json.loads(sys.argv[1])

def say(**record):
    print(json.dumps(record), flush=True)

def row(peer, note="", milliseconds=None):
    status = "measured" if milliseconds else "skipped"
    time_ms = milliseconds and {"median": milliseconds, "low": milliseconds, "high": milliseconds}
    keys = ("case", "shape", "loss", "head", "dtype", "malloc")
    fields = {key: request[key] for key in keys} | {"peer": peer, "status": status, "note": note, "time_ms": time_ms}
    say(table="rows", heading="made up", header=["peer", "note"], cells=[peer, note], row=fields, failed=False)

say(table="facts", cells=[], row={"cpu": "none", "malloc": "default"})
"""


def worker(code: str) -> tuple[str, ...]:
    """Return the command of a job that says what the code says, by `say`, `row` and the `request`."""
    return (sys.executable, "-c", CODE + code)
