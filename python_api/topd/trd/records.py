"""The file of a run: JSON, a line each; first the settings, then a record for each answer, as it comes.

One process writes, and holds a lock on the file. A record is one write of a whole line and is on the disk before the next one
begins, so that a kill leaves at most one torn line, at the end, which the next start cuts off.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

try:
    import fcntl
except ImportError:  # a system without such locks
    fcntl = None  # type: ignore[assignment]

START = b'{"topd.trd": 1, "settings": '
TEXTS = ("problem", "reference", "rollout")
SHOWN = 60


class Known(NamedTuple):
    """What is kept in memory of a record."""

    status: str
    attempts: int
    digest: bytes


class Journal:
    """The file of one run, open for writing.

    Args:
        path: of the file; it is made where it is not there.
        settings: what the run is; a file with others is refused.
        retry_failed: take the records with the status "failed" out of the file, so that they are asked for again. The file
            without them replaces the old one in one step.

    Raises:
        ValueError: another file's settings, another kind of file, a repeated id, a broken line.
        RuntimeError: another process writes the file.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, retry_failed: bool = False) -> None:
        self.path, self.known, self.cut_bytes = path, dict[str, Known](), 0
        self.earlier_attempts: dict[str, int] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = _locked(path)
        try:
            self._resume(settings)
            if retry_failed:
                self._take_out_failed()
        except BaseException:
            self.close()
            raise

    def _resume(self, settings: Mapping[str, Any]) -> None:
        self._cut_torn_line()
        if os.fstat(self._file).st_size == 0:
            self._write(START + _dumped(settings) + b"}\n")
            _sync_folder(self.path.parent)
            return
        lines = _lines(self.path)
        check_settings(self.path, _settings_in(self.path, next(lines)), settings)
        for number, line in enumerate(lines, 2):
            record = _record_in(self.path, number, line)
            if record["id"] in self.known:
                raise ValueError(f"line {number} of {self.path} repeats the id {record['id']!r}; remove one of the two records")
            self.known[record["id"]] = Known(record["status"], record["attempts"], digest(record))

    def _cut_torn_line(self) -> None:
        """Cut off what follows the last line's end; not from a file that is none of ours."""
        size = os.fstat(self._file).st_size
        begin = os.pread(self._file, len(START), 0)
        if not START.startswith(begin):
            raise ValueError(f"{self.path} does not begin with a run's settings: it is another kind of file; take another path")
        end, block = size, b""
        while end > 0 and b"\n" not in block:
            end = max(0, end - 65_536)
            block = os.pread(self._file, min(65_536, size - end), end)
        whole = end + block.rfind(b"\n") + 1 if b"\n" in block else 0
        if whole < size:
            self.cut_bytes = size - whole
            os.ftruncate(self._file, whole)
            os.fsync(self._file)

    def _take_out_failed(self) -> None:
        failed = {id_: known for id_, known in self.known.items() if known.status == "failed"}
        if not failed:
            return
        place = self.path.with_name(f".{self.path.name}.unfinished")
        lines = _lines(self.path)
        kept = _locked(place)
        try:
            os.ftruncate(kept, 0)
            _write_all(kept, next(lines))
            for number, line in enumerate(lines, 2):
                if _record_in(self.path, number, line)["id"] not in failed:
                    _write_all(kept, line)
            os.fsync(kept)
            os.replace(place, self.path)
            _sync_folder(self.path.parent)
        except BaseException:
            os.close(kept)
            place.unlink(missing_ok=True)
            raise
        os.close(self._file)
        self._file = kept
        for id_, known in failed.items():
            self.earlier_attempts[id_] = known.attempts
            del self.known[id_]

    def append(self, record: Mapping[str, Any]) -> None:
        """Write a record and wait until it is on the disk."""
        if record["id"] in self.known:
            raise ValueError(f"a record with the id {record['id']!r} is in {self.path} already")
        self._write(_dumped(record) + b"\n")
        self.known[record["id"]] = Known(record["status"], record["attempts"], digest(record))

    def _write(self, line: bytes) -> None:
        before = os.fstat(self._file).st_size
        try:
            _write_all(self._file, line)
            os.fsync(self._file)
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._file, before)
            raise

    def close(self) -> None:
        """Close the file and let its lock go."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


def _locked(path: Path) -> int:
    """Open the file for appending and lock it; again where another process has just replaced it.

    Raises:
        RuntimeError: another process holds the lock.
    """
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        if fcntl is None:
            return file
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(file)
            raise RuntimeError(f"{path} is being written by another process; wait for it, or take another file") from error
        except OSError:  # a file system without locks
            return file
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), path.stat()):
                return file
        os.close(file)


def _write_all(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # not on every system
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _dumped(value: object) -> bytes:
    """Return the value as one line of JSON in UTF-8; half a surrogate pair is written as its escape."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace")


def _lines(path: Path) -> Iterator[bytes]:
    """Return the file's whole lines; a torn one at the end is left out."""
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield line


def _settings_in(path: Path, line: bytes) -> dict[str, Any]:
    try:
        settings = json.loads(line)["settings"] if line.startswith(START) else None
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} does not begin with a run's settings: it is another kind of file; take another path")
    return settings


def _record_in(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
        fits = isinstance(record["id"], str) and isinstance(record["status"], str) and isinstance(record["attempts"], int)
    except (ValueError, TypeError, KeyError):
        fits = False
    if not fits:
        raise ValueError(f"line {number} of {path} is no record of a run; remove the line to have it asked for again")
    return dict(record)


def digest(record: Mapping[str, Any]) -> bytes:
    """Return a short mark of the texts that a record answers: equal where problem, reference and rollout are."""
    texts = [record.get(name) for name in TEXTS]
    return hashlib.blake2b(_dumped(texts), digest_size=16).digest()


def check_settings(path: Path, there: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Check that a run goes on with the settings that it began with.

    Raises:
        ValueError: the file's settings are not the wanted ones; the message names every difference.
    """
    wanted = json.loads(_dumped(wanted))
    different = [name for name in {**wanted, **there} if there.get(name) != wanted.get(name)]
    if different:
        parts = [_difference(name, there.get(name), wanted.get(name), path.name) for name in different]
        raise ValueError(f"{' and '.join(parts)}; take another file")


def _difference(name: str, there: object, wanted: object, file: str) -> str:
    shown = [value if isinstance(value, str) else repr(value) for value in (there, wanted)]
    if max(map(len, shown)) > SHOWN:
        return f"{name} in {file} differs from what was given"
    return f"{name} is {shown[0]} in {file}, got {shown[1]}"


def read_run(path: str | Path) -> tuple[dict[str, Any], Iterator[dict[str, Any]]]:
    """Return the settings of a run's file and its records, one by one. A torn last line is left out; the file may be growing.

    Raises:
        ValueError: another kind of file, or a broken line.
    """
    path = Path(path)
    lines = _lines(path)
    settings = _settings_in(path, next(lines, b""))
    return settings, (_record_in(path, number, line) for number, line in enumerate(lines, 2))


def is_run(path: Path) -> bool:
    """Tell whether the file begins as a run's file does."""
    with path.open("rb") as file:
        return file.read(len(START)) == START
