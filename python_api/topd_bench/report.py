"""Markdown tables, and JSON that is either whole or absent."""

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from topd.files import write_json as write_json


def note(text: str) -> None:
    """Print a line of progress to stderr."""
    print(text, file=sys.stderr, flush=True)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table with its columns padded to one width."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])


def machine_line(machine: Mapping[str, object]) -> str:
    """Return the facts of a machine in one line."""
    return ", ".join(f"{key} {value}" for key, value in machine.items() if value is not None)


def scientific(value: float | None) -> str:
    """Return two digits, or a dash for what was not measured."""
    return "-" if value is None else f"{value:.1e}"


def strict(value: Any) -> Any:
    """Return a value as JSON knows it: numbers that are none as words."""
    if isinstance(value, dict):
        return {key: strict(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [strict(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
