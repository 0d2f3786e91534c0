"""Run the code of a documentation page as its reader does: every python block, in order, in one namespace.

A `text` block right behind a python block is what that block prints, or the error in which it ends ("ValueError: ..."). Words
must be the same; a number may be off by one in its last printed digit. "..." stands for anything. Of bash blocks those run that
are one `topd` command with a text block behind them.
"""

import contextlib
import io
import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

from topd.cli.main import main

DOCS = Path(__file__).parents[2] / "docs"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ERROR = re.compile(r"[A-Za-z]\w*Error: ")
NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?(?![\w])")


class Block(NamedTuple):
    """A block of code of a page, and the text block behind it. `command`: it is a `topd` command, else python."""

    code: str
    line: int
    text: str | None
    command: bool = False


def blocks_of(page: Path) -> list[Block]:
    """Return a page's python blocks, and its commands with a text block behind them, in order."""
    source, blocks = page.read_text(), list[Block]()
    fences = list(FENCE.finditer(source))
    for place, fence in enumerate(fences):
        behind = fences[place + 1] if place + 1 < len(fences) else None
        text = behind[2] if behind is not None and behind[1] == "text" else None
        command = fence[1] == "bash" and text is not None and fence[2].startswith("topd ")
        if fence[1] == "python" or command:
            blocks.append(Block(fence[2], source.count("\n", 0, fence.start(2)), text, command))
    return blocks


def run_page(page: Path) -> dict[str, Any]:
    """Run a page, check what it prints and raises, and return the names that it leaves behind."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks_of(page):
        place = f"{page.name}, line {block.line}"
        raises = block.text is not None and ERROR.match(block.text) is not None
        raised, printed = "nothing", io.StringIO()
        with contextlib.redirect_stdout(printed):
            try:
                if block.command:
                    assert main(shlex.split(block.code)[1:]) == 0, place
                else:
                    exec(compile("\n" * block.line + block.code, str(page), "exec"), names)
            except Exception as error:
                if not raises:
                    raise
                raised = f"{type(error).__name__}: {error}"
        if block.text is not None:
            assert_same_text(raised if raises else printed.getvalue(), block.text, place)
    return names


def assert_same_text(came: str, page: str, place: str) -> None:
    """Check that what came is what the page shows, but for line breaks, the last digit of numbers, and "..."."""
    pieces = [re.escape(NUMBER.sub("#", " ".join(piece.split()))) for piece in page.split("...")]
    words = NUMBER.sub("#", " ".join(came.split()))
    assert re.fullmatch(r"\s?.*?\s?".join(pieces), words), f"{place} shows\n{page}\nand this came\n{came}"
    if "..." in page:
        return
    for shown, number in zip(NUMBER.findall(page), NUMBER.findall(came), strict=True):
        near = abs(_value(shown) - _value(number)) <= 1.01 * _last_digit(shown)
        assert near, f"{place} shows {shown}, and {number} came:\n{came}"


def _value(number: str) -> float:
    return float(number.replace(",", ""))


def _last_digit(number: str) -> float:
    """Return one in the last printed digit of a number; 0 of an integer, which must be the same."""
    mantissa, _, exponent = number.partition("e")
    if not exponent and "." not in mantissa:
        return 0.0
    return 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
