"""Markdown tables, and JSON that is either whole or absent."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


def note(text: str) -> None:
    """A line of progress on stderr."""
    print(text, file=sys.stderr, flush=True)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with its columns padded to one width."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])


def machine_line(machine: Mapping[str, object]) -> str:
    """The machine record in one line."""
    return ", ".join(f"{key} {value}" for key, value in machine.items() if value is not None)


def scientific(value: float | None) -> str:
    """Two digits, or a dash for what was not measured."""
    return "-" if value is None else f"{value:.1e}"


def write_json(path: Path, data: object) -> None:
    """Write to a neighbour and move it into place, so that no reader ever sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(data, indent=1) + "\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
