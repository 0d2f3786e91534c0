"""The lines of `python -m topd_bench.gpu`, as they come: printed as Markdown tables that grow, written as JSON, a line each."""

import json
from pathlib import Path
from typing import IO, Any

from topd_bench.gpu import kernels, rates, times, tune
from topd_bench.report import strict
from topd_bench.runner import Record

HEADERS = {
    "facts": ("fact", "value"),
    "rates": rates.HEADER,
    "times": times.HEADER,
    "kernels": kernels.HEADER,
    "tests": ("tests", "outcome"),
    "tuned": tune.HEADER,
    "jobs": ("job", "how it ended", "seconds"),
}


def record(table: str, row: Any) -> Record:
    """Return the line of a table that a row is: its cells to print, its fields for the file."""
    return {"table": table, "cells": row.cells(), "row": row.row(), "failed": getattr(row, "failed", False) is True}


def plain(table: str, *cells: str, failed: bool = False) -> Record:
    """Return the line of a table of words."""
    return {"table": table, "cells": list(cells), "row": dict(zip(HEADERS[table], cells, strict=True)), "failed": failed}


class Report:
    """Prints every line under its job and its table's head, and writes it; nothing is kept back."""

    def __init__(self, path: Path | None) -> None:
        self.file: IO[str] | None = None if path is None else path.open("w", encoding="utf-8")
        self.place = ("", "")

    def add(self, job: str, line: Record) -> None:
        """Print and write a line of a job."""
        place = job, line["table"]
        if place[1] != "jobs" and place != self.place:
            self.print(f"\n### {job}" if job != self.place[0] else "")
            self._print_row(HEADERS[place[1]])
            self._print_row(["---"] * len(HEADERS[place[1]]))
        if place[1] == "jobs":
            name, how, seconds = line["cells"]
            self.print(f"\n{name}: {how}, {seconds} s")
        else:
            self._print_row(line["cells"])
        self.place = place
        self.write({"job": job, "table": line["table"], **line["row"], "failed": bool(line.get("failed"))})

    def write(self, entry: dict[str, Any]) -> None:
        """Write one line of JSON."""
        if self.file is not None:
            self.file.write(json.dumps(strict(entry), allow_nan=False) + "\n")
            self.file.flush()

    def print(self, text: str) -> None:
        """Print a line at once."""
        print(text, flush=True)

    def _print_row(self, cells: Any) -> None:
        self.print("| " + " | ".join(str(cell) for cell in cells) + " |")
