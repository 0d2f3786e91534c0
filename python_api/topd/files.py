"""Files that are either whole or absent: written beside their place, flushed to the disk, moved into it.

A process that is killed meanwhile leaves its unfinished file behind. It holds a lock on the file while it writes, which the
system drops when the process ends, so that `remove_leftovers` knows what nobody writes any more.
"""

import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # no such locks on this system: nothing is taken for a leftover
    fcntl = None  # type: ignore[assignment]

UNFINISHED = re.compile(r"\.(?P<name>.+)\.\d+\.unfinished")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a path to write to; what stands there takes `path`'s place when the block ends without an error, else it goes."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        with _opened_for_writing(unfinished):
            yield unfinished
            with unfinished.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _opened_for_writing(path: Path) -> IO[bytes]:
    """Open a new file, locked until it is closed; once more where `remove_leftovers` took it before it was locked."""
    while True:
        file = path.open("wb")
        if fcntl is None:
            return file
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()


def remove_leftovers(folder: Path, names: Collection[str]) -> None:
    """Remove the unfinished files of these names that a killed process left in the folder; none that is being written."""
    if fcntl is None:
        return
    for path in folder.glob(".*.unfinished"):
        match = UNFINISHED.fullmatch(path.name)
        if match is None or match["name"] not in names:
            continue
        with suppress(OSError), path.open("rb") as file:  # another process writes it, or has just finished
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text."""
    with whole(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Write a value as JSON."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """Write records as JSON, a line each."""
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def save(path: Path, value: Mapping[str, Any], writer: Callable[[Mapping[str, Any], Path], None]) -> None:
    """Write a value by a function of it and a path, as torch.save is one."""
    with whole(path) as unfinished:
        writer(value, unfinished)
