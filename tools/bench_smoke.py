"""`make bench-smoke`: does `topd bench` work here, and is no ratio far beyond what it should be.

A few lines of `topd bench` with few rounds. Each ratio has a bound in bench_bounds.json, generous for a busy machine; beyond
twice the bound the command fails. Ratios are medians of interleaved rounds, so that a load on the machine falls on both sides;
a line that fails is measured again with more rounds, twice, before it counts.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from topd_bench.report import markdown_table, note

BOUNDS = Path(__file__).with_name("bench_bounds.json")
FACTOR = 2.0
ROUNDS = (3, 9, 21)
HEADER = ("line", "ratio", "measured", "bound", "at most", "")


class Ratio(NamedTuple):
    """A ratio of a line: "ours/floor" and the like, of times or of memory."""

    line: str
    pair: str
    value: float
    bound: float

    @property
    def bad(self) -> bool:
        return not self.value <= FACTOR * self.bound

    def cells(self) -> list[str]:
        numbers = (f"{self.value:.3f}", f"{self.bound:g}", f"{FACTOR * self.bound:g}")
        return [self.line, self.pair, *numbers, "TOO MUCH" if self.bad else ""]


def measured(words: Sequence[str]) -> list[dict[str, Any]]:
    """Return the rows of `topd bench` with these words.

    Raises:
        RuntimeError: it failed.
    """
    with tempfile.TemporaryDirectory(prefix="topd-bench-") as folder:
        path = Path(folder) / "out.json"
        command = [sys.executable, "-m", "topd.cli.main", "bench", *words, "--json", str(path)]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            said = run.stdout[-2000:] + run.stderr[-2000:]
            raise RuntimeError(f"topd bench {' '.join(words)} ended with {run.returncode}: {said}")
        rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    return rows


def value_of(rows: Sequence[dict[str, Any]], pair: str) -> float:
    """Return the median ratio of two peers' times, or the ratio of their memory; NaN where one was not measured."""
    above, below = pair.split("/")
    by_peer = {row["peer"]: row for row in rows if row["status"] == "measured"}
    if above not in by_peer or below not in by_peer:
        return float("nan")
    row = by_peer[above]
    if "beyond_mib" in row:
        return float(row["beyond_mib"] / by_peer[below]["beyond_mib"])
    pairs = zip(row["samples_ms"], by_peer[below]["samples_ms"], strict=True)
    return float(statistics.median(above_ms / below_ms for above_ms, below_ms in pairs))


def judged(name: str, line: dict[str, Any], rounds: int) -> list[Ratio]:
    """Measure a line and return its ratios."""
    timed = [] if line["words"][1] == "memory" else ["--rounds", str(rounds)]
    rows = measured([*line["words"], *timed])
    return [Ratio(name, pair, value_of(rows, pair), bound) for pair, bound in line["bounds"].items()]


def main() -> int:
    """Measure every line; the exit status is 1 where a ratio stays beyond twice its bound."""
    lines: dict[str, Any] = json.loads(BOUNDS.read_text())
    ratios: list[Ratio] = []
    for name, line in lines.items():
        for rounds in ROUNDS:
            note(f"bench-smoke: {name}, {rounds} rounds")
            latest = judged(name, line, rounds)
            if not any(ratio.bad for ratio in latest):
                break
        ratios += latest
    print(markdown_table(HEADER, [ratio.cells() for ratio in ratios]))
    return int(any(ratio.bad for ratio in ratios))


if __name__ == "__main__":
    sys.exit(main())
