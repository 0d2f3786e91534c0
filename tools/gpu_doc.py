"""Write anew what docs/gpu.md says of binaries and predicted times, and topd/costs/instructions.json: python -m tools.gpu_doc

Compiles the default variants for all targets (minutes), counts their instructions, predicts from them, and puts what the two
commands print between their marks in docs/gpu.md. Exits with 1 where a binary does not fit.
"""

import sys
from pathlib import Path

import triton

from tools import account, aot, instructions
from tools.binaries import TARGETS
from topd_bench.report import note

DOCS = Path(__file__).parents[1] / "docs" / "gpu.md"
END = "<!-- end -->\n"
# What prints a table of the document: between its mark and the next end. `tools.triton_versions` writes the last one.
BINARIES, PREDICTED, MAKE_VERSIONS = "python -m tools.aot", "python -m tools.account", "make triton-versions"


def replaced(document: str, command: str, printed: str) -> str:
    """Return the document with `printed` between the mark of a command and the next end mark.

    Raises:
        ValueError: the document lacks a mark.
    """
    begin = f"<!-- {command} -->\n"
    before, mark, rest = document.partition(begin)
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise ValueError(f"the document must hold a line {begin.strip()}, and after it a line {END.strip()}")
    return f"{before}{begin}{printed.rstrip()}\n{END}{after}"


def main() -> int:
    """Compile, count, predict, write."""
    if triton.knobs.runtime.interpret:
        sys.exit("TRITON_INTERPRET is set: interpreted kernels have no binaries; unset it")
    binaries = aot.compiled(list(TARGETS))
    instructions.write(instructions.compiled(list(TARGETS)))
    document = replaced(DOCS.read_text(), BINARIES, aot.table(binaries))
    DOCS.write_text(replaced(document, PREDICTED, account.text(account.table())))
    note(f"written: {DOCS}, {instructions.FILE}")
    return 0 if all(binary.fits for binary in binaries) else 1


if __name__ == "__main__":
    sys.exit(main())
