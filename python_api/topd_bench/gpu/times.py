"""Timings of `python -m topd_bench.gpu`: one line a shape, head and loss, in which every contender is first checked on a few
rows of the very inputs that are timed, its peak memory read, and then timed by turns."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from topd_bench.agreement import Errors, is_wrong
from topd_bench.cases import Case, Inputs, make_inputs
from topd_bench.gpu.clock import Budget, DeviceClock
from topd_bench.gpu.lines import Line, fitted
from topd_bench.report import note, scientific
from topd_bench.timing import Contender, Spread, interleave, ratio, times_ms

HEADER = (
    "shape", "N", "head", "loss", "contender", "time_ms", "/ floor", "/ ours", "TFLOP/s", "peak MiB", "value error",
    "d hidden error", "d weight error", "note",
)  # fmt: skip
MIN_ROUNDS = 3


@dataclass(frozen=True)
class TimeRow:
    """One contender in one line; None where it was not measured, `note` says why."""

    shape: str
    n: int
    head: str
    loss: str
    contender: str
    time_ms: Spread | None = None
    over_floor: Spread | None = None
    over_ours: Spread | None = None
    floor_tflop: float | None = None
    peak_mib: float | None = None
    value_error: float | None = None
    hidden_error: float | None = None
    weight_error: float | None = None
    note: str = ""

    @property
    def failed(self) -> bool:
        """Whether topd was to be timed and was not: its result was wrong, or there was none."""
        return self.contender.startswith("ours") and self.time_ms is None

    def cells(self) -> list[str]:
        """Return its cells under HEADER; TFLOP/s are those of the floor's products."""
        rate = None
        if self.floor_tflop is not None and self.time_ms is not None and self.time_ms.median > 0:
            rate = f"{self.floor_tflop / self.time_ms.median * 1e3:.0f}"
        times = ["-" if value is None else str(value) for value in (self.time_ms, self.over_floor, self.over_ours)]
        peak = "-" if self.peak_mib is None else f"{self.peak_mib:.0f}"
        errors = [scientific(error) for error in (self.value_error, self.hidden_error, self.weight_error)]
        place = [self.shape, str(self.n), self.head, self.loss, self.contender]
        return [*place, *times, rate or "-", peak, *errors, self.note]

    def row(self) -> dict[str, Any]:
        return asdict(self)


def returned_bytes(result: Any) -> int:
    """Return the bytes of the tensors that a contender gives back."""
    if isinstance(result, Tensor):
        return result.nbytes
    parts = result.values() if isinstance(result, dict) else result if isinstance(result, tuple) else ()
    return sum(part.nbytes for part in parts if isinstance(part, Tensor))


def check(line: Line, clock: DeviceClock) -> tuple[dict[str, TimeRow], dict[str, Contender]]:
    """Run every contender and judge its result; return the rows so far, and what may be timed: nothing where topd is wrong."""
    blank = TimeRow(line.shape, line.n, line.head, line.loss, "")
    tflop = None if line.flop is None else line.flop / 1e12
    rows = {name: replace(blank, contender=name, note=why) for name, why in line.skipped.items()}
    runs: dict[str, Contender] = {}
    wrong = False
    for name, run in line.runs.items():
        first = clock.first(run, returned_bytes)
        if first.reason:
            rows[name] = replace(blank, contender=name, note=first.reason)
            continue
        errors = line.errors(first.result) or Errors(None)
        rows[name] = replace(
            blank,
            contender=name,
            floor_tflop=tflop,
            peak_mib=None if name == "floor" else first.peak_mib,  # its logits are results, not memory that a loss needs beside
            value_error=errors.value,
            hidden_error=errors.hidden,
            weight_error=errors.weight,
        )
        if name.startswith("ours") and is_wrong(errors, line.limits):
            rows[name], wrong = replace(rows[name], note="wrong: nothing in this line is timed"), True
        del first
        clock.release()  # what one has taken is not missing to the next
        runs[name] = run
    return rows, {} if wrong else runs


def measure(line: Line, clock: DeviceClock, rounds: int, seconds: float) -> list[TimeRow]:
    """Check, then time by turns: as many rounds as asked, fewer where they would take longer than the line may."""
    rows, runs = check(line, clock)
    if runs:
        cost_ms = clock.calls * sum(clock.sample(run).time_ms for run in runs.values())
        rounds = max(MIN_ROUNDS, min(rounds, int(seconds * 1e3 / max(cost_ms, 1e-3))))
        samples = interleave(runs, rounds, clock, warm_up=False)
        for name, taken in samples.items():
            floor, ours = (
                ratio(taken, samples[other]) if other in samples and other != name else None for other in ("floor", "ours")
            )
            rows[name] = replace(rows[name], time_ms=times_ms(taken), over_floor=floor, over_ours=ours)
    clock.release()
    return list(rows.values())


class Wanted(NamedTuple):
    """A line to be timed: of which loss and head, and what makes it from the inputs and the seconds that it has."""

    loss: str
    head: str
    line: Callable[[Case, Inputs, float], Line]


def all_rows(
    shapes: Sequence[tuple[Case, Sequence[Wanted]]], clock: DeviceClock, budget: Budget, rounds: int, dtype: torch.dtype
) -> Iterator[TimeRow]:
    """Yield the rows of line after line, shape by shape; a line for which no time is left is named and left out."""
    for shape, wanted in shapes:
        case, reduced = fitted(shape, clock.free_bytes(), dtype.itemsize)
        if reduced:
            yield TimeRow(case.name, case.n, "-", "-", "-", note=reduced)
        inputs = None
        for loss, head, line_of in wanted:
            share = budget.share()
            if share <= 0:
                yield TimeRow(case.name, case.n, head, loss, "-", note="skipped: the time is used up")
                continue
            note(f"timing {case.name}, {loss}, {head}")
            inputs = inputs or make_inputs(case, trainable_head=True, device=clock.device, dtype=dtype)
            yield from measure(line_of(case, inputs, share), clock, rounds, share)
        del inputs
        clock.release()
