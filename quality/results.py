"""The runs on the disk: JSON lines, one a run, whole or absent."""

import json
from pathlib import Path

from quality.training import Job, Record
from topd.files import write_lines

Key = tuple[str, int, str]


def key_of(record: Record) -> Key:
    """Return which run a record is of: task, seed, row."""
    return record["task"], record["seed"], record["row"]


class Results:
    """The records of one file, written anew as a whole with each that is added."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def has(self, job: Job) -> bool:
        """Tell whether a job is done; refuse a file whose runs went another way."""
        for record in self.records:
            if key_of(record) == (job.task, job.seed, job.row):
                if record["plan"] != json.loads(json.dumps(job.plan)):
                    raise ValueError(
                        f"{self.path} holds {key_of(record)} under other settings; take another --out, or remove that file"
                    )
                return True
        return False

    def add(self, record: Record) -> None:
        """Add a run, in the order of task, seed and row, and write the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.records = sorted([*self.records, record], key=key_of)
        write_lines(self.path, self.records)
