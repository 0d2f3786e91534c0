"""Files that are either whole or absent: written beside their place, flushed to the disk, moved into it."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path to write to; what stands there takes `path`'s place when the block ends without an error, else it goes."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        yield unfinished
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with whole(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """JSON, a line each."""
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def save(path: Path, value: Mapping[str, Any], writer: Callable[[Mapping[str, Any], Path], None]) -> None:
    with whole(path) as unfinished:
        writer(value, unfinished)
