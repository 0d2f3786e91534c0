"""The lines that a job sends: rows of tables, the machine's facts, and which peer runs now."""

from collections.abc import Sequence
from typing import Any

from topd_bench.runner import Record

FACTS, NOW, ROWS = "facts", "now", "rows"
SKIPPED, FAILED, WRONG, MEASURED = "skipped", "failed", "wrong", "measured"


def row_record(
    heading: str, header: Sequence[str], cells: Sequence[str], row: dict[str, Any], *, failed: bool = False
) -> Record:
    """Return a row: under which heading and head it is printed, its cells, and its fields for the file."""
    return {"table": ROWS, "heading": heading, "header": list(header), "cells": list(cells), "row": row, "failed": failed}


def plain_record(heading: str, header: Sequence[str], cells: Sequence[str], *, failed: bool = False) -> Record:
    """Return a row whose fields are its cells."""
    return row_record(heading, header, cells, dict(zip(header, cells, strict=True)), failed=failed)


def word_record(heading: str, header: Sequence[str], peer: str, why: str, *, failed: bool = False) -> Record:
    """Return the row of a peer that was not measured: why it was not stands in the last column."""
    cells = [peer, *["-"] * (len(header) - 2), why]
    return row_record(heading, header, cells, {header[0]: peer, header[-1]: why}, failed=failed)


def now_record(peer: str) -> Record:
    """Return the line that says who runs now: a process that dies cannot say it afterwards."""
    return {"table": NOW, "cells": [peer]}


def facts_record(facts: dict[str, Any]) -> Record:
    """Return the line with the machine's facts."""
    return {"table": FACTS, "cells": [], "row": facts}
