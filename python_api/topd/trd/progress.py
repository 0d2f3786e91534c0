"""How far a run is: a bar on a terminal where rich is installed, else a line now and then."""

import importlib.util
import sys
import time
from collections import Counter
from typing import Any

LINE_EVERY = 10.0  # seconds between two plain lines


class Progress:
    """Shows the answers of a run on the standard error stream, as a context manager.

    Args:
        stage: "rollout" or "refine", as title.
        counts: of the statuses that the file has already.
        total: answers in all.
        shown: False shows nothing.
    """

    def __init__(self, stage: str, counts: Counter[str], total: int, *, shown: bool = True) -> None:
        self.stage, self.counts, self.total, self.shown = stage, counts, total, shown
        self._bar: Any = None
        self._began = self._said = time.monotonic()
        self._first = counts.total()

    def __enter__(self) -> "Progress":
        if self.shown and sys.stderr.isatty() and importlib.util.find_spec("rich") is not None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Bar(*columns, TextColumn("{task.fields[counts]}"), console=Console(stderr=True))
            self._bar.start()
            self._bar.add_task(self.stage, total=self.total, completed=self._first, counts=self._statuses())
        elif self.shown and self._first:
            self.say(f"{self.stage}: {self._first:,} of {self.total:,} answers are in the file already")
        return self

    def __exit__(self, *_error: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self.shown and self.counts.total() > self._first:
            self._line()

    def add(self, status: str) -> None:
        """Count an answer."""
        self.counts[status] += 1
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self.counts.total(), counts=self._statuses())
        elif self.shown and time.monotonic() - self._said >= LINE_EVERY:
            self._line()

    def say(self, text: str) -> None:
        """Print a line beside the bar."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        elif self.shown:
            print(text, file=sys.stderr, flush=True)

    def _line(self) -> None:
        self._said = time.monotonic()
        done, pace = self.counts.total(), (self.counts.total() - self._first) / max(self._said - self._began, 1e-9)
        left = f", {(self.total - done) / pace:,.0f} s left" if pace and done < self.total else ""
        self.say(f"{self.stage}: {done:,} of {self.total:,} ({self._statuses()}){left}")

    def _statuses(self) -> str:
        return ", ".join(f"{status} {count:,}" for status, count in sorted(self.counts.items())) or "none yet"
