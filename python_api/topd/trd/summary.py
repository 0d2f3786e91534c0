"""What a run's file holds, in numbers."""

import statistics
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from topd.trd.problems import USABLE
from topd.trd.records import read_run

WORDS = {True: "right", False: "wrong", None: "unknown"}


@dataclass(frozen=True)
class Summary:
    """The numbers of one file.

    Attributes:
        stage: "rollout" or "refine".
        records: how many.
        statuses: records by status.
        verdicts: records by (verdict of the rollout y_o, verdict of the refined y_r), each True, False or None for unknown. In
            a file of rollouts the second is None.
        median_tokens, median_characters: of the responses with the status "ok" or "length"; None without one, and tokens None
            where the generator did not count them.
        rollout_median_tokens, rollout_median_characters: of the rollouts that were refined.
        attempts: requests in all, retries too.
    """

    stage: str
    records: int
    statuses: dict[str, int]
    verdicts: dict[tuple[bool | None, bool | None], int]
    median_tokens: float | None
    median_characters: float | None
    rollout_median_tokens: float | None
    rollout_median_characters: float | None
    attempts: int

    def __str__(self) -> str:
        statuses = ", ".join(f"{name} {count:,}" for name, count in sorted(self.statuses.items()))
        lines = [f"{self.records:,} records of stage {self.stage}: {statuses or 'none'}; {self.attempts:,} requests"]
        lines += [f"  response, median length: {_length(self.median_tokens, self.median_characters)}"]
        if self.stage == "refine":
            lines += [f"  rollout, median length: {_length(self.rollout_median_tokens, self.rollout_median_characters)}"]
        if any(verdict != (None, None) for verdict in self.verdicts):
            lines += self._table()
        return "\n".join(lines)

    def _table(self) -> list[str]:
        if self.stage == "rollout":
            return ["  verdicts: " + ", ".join(f"{WORDS[first]} {n:,}" for (first, _), n in self.verdicts.items())]
        columns = [False, True, None]
        lines = ["  " + "".join(f"{word:>16}" for word in ("", *(f"refined {WORDS[each]}" for each in columns)))]
        for first in columns:
            counts = [self.verdicts.get((first, second), 0) for second in columns]
            lines.append("  " + f"{'rollout ' + WORDS[first]:>16}" + "".join(f"{each:>16,}" for each in counts))
        return lines


def summary(path: str | Path) -> Summary:
    """Return the numbers of a run's file, which may be growing.

    Raises:
        ValueError: another kind of file.
    """
    settings, records = read_run(path)
    statuses, verdicts = Counter[str](), Counter[tuple[bool | None, bool | None]]()
    lengths: dict[str, list[int]] = {name: [] for name in ("tokens", "characters", "rollout_tokens", "rollout_characters")}
    attempts = 0
    for record in records:
        statuses[record["status"]] += 1
        attempts += record["attempts"]
        refined = record["stage"] == "refine"
        if record["status"] in USABLE:
            verdicts[(record.get("rollout_verdict"), record["verdict"]) if refined else (record["verdict"], None)] += 1
            lengths["tokens"] += [record["tokens"]] if record.get("tokens") is not None else []
            lengths["characters"].append(len(record["text"]))
        if refined:
            lengths["rollout_tokens"] += [record["rollout_tokens"]] if record.get("rollout_tokens") is not None else []
            lengths["rollout_characters"].append(len(record["rollout"]))
    medians = {name: statistics.median(values) if values else None for name, values in lengths.items()}
    return Summary(
        stage=settings["stage"],
        records=statuses.total(),
        statuses=dict(statuses),
        verdicts=dict(verdicts),
        median_tokens=medians["tokens"],
        median_characters=medians["characters"],
        rollout_median_tokens=medians["rollout_tokens"],
        rollout_median_characters=medians["rollout_characters"],
        attempts=attempts,
    )


def _length(tokens: float | None, characters: float | None) -> str:
    if characters is None:
        return "none"
    return f"{tokens:,.0f} tokens, {characters:,.0f} characters" if tokens is not None else f"{characters:,.0f} characters"
