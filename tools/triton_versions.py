"""Run the interpreter's tests and the compilation ahead of time under several versions of Triton, each in an environment of its
own, and print a line for each.

    make triton-versions
    make triton-versions TRITON="3.6.0 3.9.0"
    make triton-versions TRITON=--write          all of them, and put the table into docs/gpu.md

torch 2.11 comes with Triton 3.6, torch 2.13 with 3.7.1. An environment holds Triton and what goes with it, and takes the rest
from the project's.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tools.gpu_doc import DOCS, MAKE_VERSIONS, replaced
from tools.versions import environment, verdict
from topd_bench.report import markdown_table

# What an environment needs beside a version. Triton 3.6's interpreter reads an array of one entry as a number: numpy lets it
# up to 2.3.
VERSIONS: dict[str, tuple[str, ...]] = {"3.6.0": ("numpy<2.4",), "3.7.1": (), "3.9.0": ()}
TESTS = ("-n", "2", "--dist", "loadfile", "tests/kernels", "-m", "not slow")
MOST = ("registers", "stack_bytes", "spills", "shared_bytes")
HEADS = ("Triton", "interpreter's tests", "binaries", "registers", "stack, B", "spills", "shared, B", "fits")
ROOT = Path(__file__).parents[1]
# The environments do not see where the project's has the packages of this repository.
PATH = os.pathsep.join([str(ROOT / "python_api"), str(ROOT)])


def _run(*command: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": PATH, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True
    )


def interpreted(python: str) -> tuple[bool, str]:
    """Run the interpreter's tests, and return what `tools.versions.verdict` does; of pytest's last line how many passed, not
    what they took."""
    passed, line = verdict(_run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS))
    return passed, re.sub(r",? \d+ warnings?| in \d.*", "", line)


def compiled(python: str) -> tuple[bool, list[str]]:
    """Compile the default variants for all targets; return whether all of them fit, how many there are, and the most
    registers, stack, spills and shared memory that one needs. What does not fit is printed."""
    with tempfile.TemporaryDirectory() as folder:
        numbers = Path(folder) / "binaries.json"
        done = _run(python, "-m", "tools.aot", "--json", str(numbers), "--jobs", "2")
        if done.returncode:
            print(done.stdout, flush=True)
        binaries = json.loads(numbers.read_text()) if numbers.exists() else []
    most = [str(max((each[name] for each in binaries), default="")) for name in MOST]
    return done.returncode == 0, [str(len(binaries)), *most]


def main(arguments: list[str]) -> int:
    """Run every version; 1 where a test failed or a binary does not fit."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("versions", nargs="*", help=f"default: {' '.join(VERSIONS)}")
    parser.add_argument("--write", action="store_true", help="put the table into docs/gpu.md, where all versions are run")
    options = parser.parse_args(arguments)
    if options.write and options.versions:
        parser.error("--write puts a table of all versions into docs/gpu.md; leave the versions out")
    rows, verdicts = [], []
    for version in options.versions or list(VERSIONS):
        python = str(environment(",".join((f"triton=={version}", *VERSIONS.get(version, ())))))
        passed, line = interpreted(python)
        fits, numbers = compiled(python)
        verdicts += [passed, fits]
        rows.append([version, line, *numbers, "yes" if passed and fits else "NO"])
        print(*rows[-1], flush=True)
    table = markdown_table(HEADS, rows)
    print(table)
    if options.write:
        DOCS.write_text(replaced(DOCS.read_text(), MAKE_VERSIONS, table))
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
