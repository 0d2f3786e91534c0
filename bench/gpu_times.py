"""Timings of `python -m bench.gpu`: one line a shape, head and loss, in which every contender is first checked beside float64
on a few rows, its peak memory read, and then timed by turns.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import gpu_peers, peers
from bench import transport as transport_peers
from bench.cases import Case, Inputs
from bench.gpu_clock import Budget, Clock, spread_ms
from bench.gpu_judge import Check
from bench.measure import Spread, ratio
from bench.peers import Gradients
from bench.report import note, scientific

HEADER = (
    "shape", "N", "head", "loss", "contender", "time_ms", "/ floor", "/ ours", "TFLOP/s", "peak MiB", "value error",
    "d hidden error", "note",
)  # fmt: skip
ROWS = 8
MIN_ROUNDS = 3
COMPILE_SECONDS = 25.0
# What ours may be off by: values have float32 logits, gradients dlogits and results of 16 bits (bench.gpu_judge).
VALUE_LIMIT, HIDDEN_ROUNDINGS = 1e-3, 4


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
    note: str = ""

    def cells(self) -> list[str]:
        """Its cells under HEADER; TFLOP/s are those of the floor's products."""
        rate = None
        if self.floor_tflop is not None and self.time_ms is not None and self.time_ms.median > 0:
            rate = f"{self.floor_tflop / self.time_ms.median * 1e3:.0f}"
        times = ["-" if value is None else str(value) for value in (self.time_ms, self.over_floor, self.over_ours)]
        peak = "-" if self.peak_mib is None else f"{self.peak_mib:.0f}"
        errors = [scientific(self.value_error), scientific(self.hidden_error)]
        place = [self.shape, str(self.n), self.head, self.loss, self.contender]
        return [*place, *times, rate or "-", peak, *errors, self.note]

    def row(self) -> dict[str, Any]:
        return asdict(self)


class Line(NamedTuple):
    """What a line is about, and its contenders by name; "floor" and "ours" are what the others are divided by."""

    shape: str
    n: int
    head: str
    loss: str
    runs: Mapping[str, Callable[[], Any]]
    flop: float | None
    errors: Callable[[Any], tuple[float | None, float | None]]
    skipped: Mapping[str, str]


def returned_bytes(result: Any) -> int:
    """Bytes of the tensors that a contender gives back."""
    if isinstance(result, Tensor):
        return result.nbytes
    parts = result.values() if isinstance(result, dict) else result if isinstance(result, tuple) else ()
    return sum(part.nbytes for part in parts if isinstance(part, Tensor))


def measure(line: Line, clock: Clock, rounds: int, seconds: float) -> list[TimeRow]:
    """Check, then time by turns: as many rounds as asked, fewer where they would take longer than the line may."""
    blank = TimeRow(line.shape, line.n, line.head, line.loss, "")
    tflop = None if line.flop is None else line.flop / 1e12
    rows = {name: replace(blank, contender=name, note=why) for name, why in line.skipped.items()}
    runs, cost_ms = {}, 0.0
    for name, run in line.runs.items():
        taken = clock.first(run, returned_bytes)
        if taken.reason:
            rows[name] = replace(blank, contender=name, note=taken.reason)
            continue
        value, hidden = line.errors(taken.result)
        rows[name] = replace(
            blank, contender=name, floor_tflop=tflop, peak_mib=taken.peak_mib, value_error=value, hidden_error=hidden
        )
        del taken
        runs[name] = run
        cost_ms += clock.time_ms(run)
    rounds = max(MIN_ROUNDS, min(rounds, int(seconds * 1e3 / max(cost_ms, 1e-3))))
    samples = clock.interleave(runs, rounds)
    for name, taken_times in samples.items():
        floor, ours = (
            ratio(taken_times, samples[other]) if other in samples and other != name else None for other in ("floor", "ours")
        )
        rows[name] = replace(rows[name], time_ms=spread_ms(taken_times), over_floor=floor, over_ours=ours)
    if "floor" in rows:  # its logits are results, not memory that a loss needs beside them
        rows["floor"] = replace(rows["floor"], peak_mib=None)
    clock.release()
    return list(rows.values())


def _relative(found: Tensor, true: Tensor) -> float:
    return float((found.double() - true).abs().max() / true.abs().max())


def _loss_errors(rows: Tensor, true: tuple[Tensor, Tensor | None], result: Any) -> tuple[float | None, float | None]:
    """Of a `Gradients`; a mean (Liger's) has no values of its own, the floor neither."""
    if not isinstance(result, Gradients):
        return None, None
    value = _relative(result.value[rows], true[0]) if result.value.dim() else None
    return value, None if true[1] is None else _relative(result.hidden[rows], true[1])


def loss_line(case: Case, inputs: Inputs, head: str, loss: str, *, compiled: bool) -> Line:
    """One loss of one shape."""
    inputs.student_weight.requires_grad_(head == "trainable")
    chosen = gpu_peers.chosen_of(inputs, loss)
    at = torch.linspace(0, case.n - 1, min(ROWS, case.n)).long().to(inputs.student_hidden.device)
    runs: dict[str, Callable[[], Any]] = {"floor": partial(peers.floor, inputs, loss)}
    runs |= gpu_peers.differentiable(inputs, loss, chosen, compiled=compiled)
    flop = case.gemm_flop(trainable_head=head == "trainable", teacher=peers.has_teacher(loss))
    skipped = {} if compiled else {"torch.compile": "skipped: no time left to compile"}
    errors = partial(_loss_errors, at, gpu_peers.truth(inputs, loss, chosen, at))
    return Line(case.name, case.n, head, loss, runs, float(flop), errors, skipped)


def score_line(case: Case, inputs: Inputs) -> Line:
    """score_tokens, as it is called (by tiles) and fused, without gradients; the error is the reverse KL's."""
    runs: dict[str, Callable[[], Any]] = {
        "floor": partial(gpu_peers.floor_of_scores, inputs),
        "ours": partial(gpu_peers.our_scores, inputs),
        "ours, fused": partial(gpu_peers.fused_scores, inputs),
        "eager": partial(gpu_peers.eager_scores, inputs),
    }
    at = torch.linspace(0, case.n - 1, min(ROWS, case.n)).long().to(inputs.student_hidden.device)
    true, _ = gpu_peers.truth(inputs, "reverse_kl", gpu_peers.chosen_of(inputs, "reverse_kl"), at)

    def errors(result: Any) -> tuple[float | None, float | None]:
        return (_relative(result[1, at], true), None) if isinstance(result, Tensor) else (None, None)

    flop = 2.0 * case.n * case.vocab * (case.student_width + case.teacher_width)
    return Line(case.name, case.n, "-", "score_tokens", runs, flop, errors, {})


def transport_line(device: torch.device, m: int, window: int, width: int) -> Line:
    """bench.transport's contenders on the device, the loop of one problem at a time left out; POT where it is installed."""
    pairs = transport_peers.Pairs(*(part.to(device) for part in transport_peers.make_pairs(m, window, width)))
    skipped = {}
    try:
        found = transport_peers.contenders(pairs, 0.05, 1e-4)
    except ImportError:
        skipped = {"ot.batch": "skipped: POT is not installed"}
        found = {"topd": partial(_near_future, pairs)}
    kept = {"topd": "ours", "ot.batch": "ot.batch", "ot.batch matched": "ot.batch matched"}
    runs = {new: found[old] for old, new in kept.items() if old in found}

    def errors(result: Any) -> tuple[float | None, float | None]:
        return float((result.plan.sum(-1) * window - 1).abs().max()), None

    shape = f"{m} x {window} x {window}, d = {width}"
    return Line(shape, m, "-", "transport, largest row error", runs, None, errors, skipped)


def _near_future(pairs: transport_peers.Pairs) -> transport_peers.Found:
    import topd

    found = topd.near_future_divergence(*pairs)
    return transport_peers.Found(found.distance, found.plan)


def verdict(rows: list[TimeRow], dtype: torch.dtype) -> Iterator[Check]:
    """Ours in the timed lines: measured at all, and right."""
    hidden_limit = HIDDEN_ROUNDINGS * torch.finfo(dtype).eps / 2 + 1e-5
    for row in rows:
        if not row.contender.startswith("ours"):
            continue
        name = f"timed: {row.shape}, {row.head}, {row.loss}, {row.contender}"
        if row.time_ms is None:
            yield Check(name, row.note, torch.inf, 0.0)
        if row.value_error is not None:
            yield Check(name, "value", row.value_error, VALUE_LIMIT)
        if row.hidden_error is not None:
            yield Check(name, "d hidden", row.hidden_error, hidden_limit)


@dataclass(frozen=True)
class Plan:
    """What is timed."""

    shapes: tuple[Case, ...]
    losses: tuple[str, ...]
    heads: tuple[str, ...]
    rounds: int
    dtype: torch.dtype
    transport: tuple[int, int, int] | None
    compiled: bool = True

    @property
    def lines(self) -> int:
        return len(self.shapes) * (len(self.losses) * len(self.heads) + 1) + (self.transport is not None)


def _shape_rows(plan: Plan, case: Case, clock: Clock, budget: Budget) -> Iterator[list[TimeRow]]:
    """The lines of a shape; its inputs go when they are done."""
    inputs = gpu_peers.make_inputs(case, clock.device, plan.dtype)
    lines: list[tuple[str, str]] = [(loss, head) for loss in plan.losses for head in plan.heads]
    for loss, head in [*lines, ("score_tokens", "-")]:
        share = budget.share()
        if share <= 0:
            yield [TimeRow(case.name, case.n, head, loss, "-", note="skipped: the time is used up")]
            continue
        note(f"timing {case.name}, {loss}, {head}")
        if loss == "score_tokens":
            line = score_line(case, inputs)
        else:
            line = loss_line(case, inputs, head, loss, compiled=plan.compiled and share > COMPILE_SECONDS)
        yield measure(line, clock, plan.rounds, share)


def all_rows(plan: Plan, clock: Clock, seconds: float, free_bytes: Callable[[], int]) -> Iterator[list[TimeRow]]:
    """Line by line; a line for which no time is left is named and left out."""
    budget = Budget(seconds, plan.lines)
    if plan.transport is not None:
        note("timing transport")
        yield measure(transport_line(clock.device, *plan.transport), clock, plan.rounds, budget.share())
    for shape in plan.shapes:
        case, reduced = gpu_peers.fitted(shape, free_bytes(), plan.dtype.itemsize)
        if reduced:
            note(reduced)
            yield [TimeRow(case.name, case.n, "-", "-", "-", note=reduced)]
        yield from _shape_rows(plan, case, clock, budget)
        clock.release()
