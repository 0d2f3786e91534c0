"""How times and memory grow over a sweep: lines through the points of each system, and what is not tried at larger sizes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from topd_bench.catalogue import name_of
from topd_bench.records import MEASURED
from topd_bench.request import Request

TIME, MEMORY = "time_ms", "beyond_mib"
GIVES_UP = ("out of memory", "a call takes", "a call would take", "the process died")
TIME_HEADER = ("loss", "head", "peer", "sizes", "slope: d log time / d log {}")
MEMORY_HEADER = ("loss", "head", "peer", "sizes from", "sizes", "MiB beyond gradients, per {}", "share of eager's")


class Line(NamedTuple):
    """The points of one system: its sizes, and milliseconds or MiB."""

    loss: str
    head: str
    peer: str
    sizes: tuple[int, ...]
    values: tuple[float, ...]


def size_of(row: Mapping[str, Any], axis: str) -> int:
    """Return where a row stands on an axis, "tokens" or "vocab"."""
    return int(row["shape"]["n" if axis == "tokens" else "vocab"])


def value_of(row: Mapping[str, Any]) -> float | None:
    """Return the median milliseconds of a row, or its MiB beyond the gradients; None where it was not measured."""
    if row.get("status") != MEASURED:
        return None
    value = row["beyond_mib"] if row["case"] == "memory" else row["time_ms"] and row["time_ms"]["median"]
    return None if value is None else float(value)


def lines_of(rows: Sequence[Mapping[str, Any]], axis: str) -> list[Line]:
    """Return the line of each loss, head and peer, in the order of their first rows."""
    points: dict[tuple[str, str, str], dict[int, float]] = {}
    for row in rows:
        value = value_of(row)
        if value is not None:
            points.setdefault((row["loss"], row["head"], row["peer"]), {})[size_of(row, axis)] = value
    return [Line(*key, tuple(sorted(line)), tuple(line[size] for size in sorted(line))) for key, line in points.items()]


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Return the slope of the line of least squares; NaN through fewer than two places."""
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread if spread else math.nan


def log_slope(line: Line) -> float:
    """Return the power of the size with which a line grows: 1 is linear."""
    return slope([math.log(size) for size in line.sizes], [math.log(max(value, 1e-9)) for value in line.values])


def upper_half(line: Line) -> Line:
    """Return the larger half of a line's points: below, a call is smaller than what chunked losses keep to work in."""
    start = (len(line.sizes) - 1) // 2
    return line._replace(sizes=line.sizes[start:], values=line.values[start:])


def upper_slope(line: Line) -> float:
    """Return the MiB with each row or entry, over the larger half of the sizes."""
    upper = upper_half(line)
    return slope(upper.sizes, upper.values)


def named(line: Line) -> tuple[str, str, str]:
    """Return loss, head and peer as tables have them."""
    return line.loss, line.head, name_of(line.peer)


def slope_rows(lines: Sequence[Line], axis: str, *, memory: bool) -> tuple[list[str], list[list[str]]]:
    """Return the head and the rows of the table of slopes."""
    word = "N" if axis == "tokens" else "V"
    if not memory:
        shown = [line for line in lines if line.peer != "warm_floor"]
        cells = [[*named(line), str(len(line.sizes)), f"{log_slope(line):.3f}"] for line in shown]
        return [name.format(word) for name in TIME_HEADER], cells
    unit = "row" if axis == "tokens" else "entry"
    slopes = {line[:3]: upper_slope(line) for line in lines}
    cells = []
    for line in lines:
        eager = slopes.get((line.loss, line.head, "eager"))
        share = f"{slopes[line[:3]] / eager:.1%}" if eager else "-"
        upper = upper_half(line)
        cells.append([*named(line), f"{upper.sizes[0]:,}", str(len(upper.sizes)), f"{slopes[line[:3]]:.6f}", share])
    return [name.format(unit) for name in MEMORY_HEADER], cells


class Growth:
    """What a sweep has learned of each system: at larger sizes it leaves out who would exceed the limits."""

    def __init__(self, axis: str) -> None:
        self.axis = axis
        self.latest: dict[tuple[str, str, str], tuple[int, float]] = {}
        self.ended: dict[tuple[str, str, str], str] = {}

    def learn(self, row: Mapping[str, Any]) -> None:
        """Keep a row's time, or why there is none."""
        if "shape" not in row:
            return
        key, size = (row["loss"], row["head"], row["peer"]), size_of(row, self.axis)
        value, note = value_of(row), str(row.get("note", ""))
        if value is not None and row["case"] != "memory":
            self.latest[key] = (size, value / 1e3)
        elif note.startswith(GIVES_UP):
            self.ended.setdefault(key, f"{note} (at {'N' if self.axis == 'tokens' else 'V'} = {size:,})")

    def reduced(self, request: Request) -> Request:
        """Return the job without those who would exceed a limit."""
        size = request.sizes.n if self.axis == "tokens" else request.sizes.vocab
        for peer in request.peers or ():
            key = (request.loss, request.head, peer)
            if key in self.ended:
                request = request.without(peer, self.ended[key])
            elif key in self.latest:
                before, seconds = self.latest[key]
                expected = seconds * size / before
                if expected > request.limit_seconds:
                    why = f"a call would take about {expected:.0f} s, the limit is {request.limit_seconds:g} s"
                    request = request.without(peer, why)
        return request
