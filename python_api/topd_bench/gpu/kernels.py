"""Each Triton launch by name: its time beside what its bytes and its instructions take at least.

An op's launches are first run once, in order, and what they wrote is held against float64: a wrong kernel is not timed.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from topd_bench.agreement import ROWS, few, of_largest
from topd_bench.cases import Case
from topd_bench.gpu.clock import DeviceClock
from topd_bench.gpu.floors import Rates
from topd_bench.losses import divergence_of_logprobs
from topd_bench.peers.transport import make_pairs
from topd_bench.timing import Spread, interleave, times_ms

HEADER = ("op", "kernel", "time_ms", "MiB moved", "GB/s", "bytes, ms", "instructions, ms", "/ floor", "note")
LIMIT = 1e-3
ZIPF_ROWS = 256  # drawn at a time: each takes a number for every entry of the vocabulary


class Op(NamedTuple):
    """One call of an op: its launches, and the error of what they have written."""

    name: str
    launches: list[Any]
    error: Callable[[], float]


@dataclass(frozen=True)
class KernelRow:
    """One launch, and what its bytes take at a copy's rate and its instructions at the rate of issue; None where it was not
    measured, or is not known."""

    op: str
    kernel: str
    time_ms: Spread | None
    moved_bytes: int | None
    byte_ms: float | None
    issue_ms: float | None
    note: str = ""

    @property
    def failed(self) -> bool:
        return self.time_ms is None

    def cells(self) -> list[str]:
        """Return its cells under HEADER."""
        moved = rate = "-"
        if self.moved_bytes is not None and self.time_ms is not None:
            moved = f"{self.moved_bytes / 2**20:.1f}"
            rate = f"{self.moved_bytes / max(self.time_ms.median, 1e-9) / 1e6:.0f}"
        spread = self.time_ms
        time_ms = "-" if spread is None else f"{spread.median:.3f} ({spread.low:.3f}-{spread.high:.3f})"
        floors = ["-" if floor is None else f"{floor:.3f}" for floor in (self.byte_ms, self.issue_ms)]
        over = "-" if self.over_floor is None else f"{self.over_floor:.2f}"
        return [self.op, self.kernel, time_ms, moved, rate, *floors, over, self.note]

    @property
    def over_floor(self) -> float | None:
        """Return its time over the larger one of its floors."""
        floor = max(self.byte_ms or 0.0, self.issue_ms or 0.0)
        return self.time_ms.median / floor if floor and self.time_ms is not None else None

    def row(self) -> dict[str, Any]:
        return {**asdict(self), "over_floor": self.over_floor}


def _error_of(written: Tensor, rows: Tensor, true: Tensor) -> float:
    return of_largest(written[rows], true)


def tile_ops(rows: int, vocab: int, ids: int, device: torch.device, dtype: torch.dtype) -> Iterator[Op]:
    """Yield the row ops on a chunk [rows, vocab] of float32 tiles, gradients in the models' dtype."""
    from topd_kernels.divergence_rows import launches as divergence_rows
    from topd_kernels.logprob_rows import launches as logprob_rows

    generator = torch.Generator(device).manual_seed(0)
    student, teacher = (torch.empty(rows, vocab, device=device).normal_(0, 2, generator=generator) for _ in range(2))
    grad, checked = torch.empty(rows, vocab, dtype=dtype, device=device), few(rows, ROWS, device)
    student_logprobs, teacher_logprobs = (tile[checked].double().log_softmax(-1) for tile in (student, teacher))
    for divergence, parameter in (("reverse_kl", 0.0), ("jsd", 0.5)):
        spec = divergence_rows.Spec(1.0, None, 1.0, None, 1.0, divergence, parameter, 0.0)
        order, outputs = divergence_rows.launches(student, teacher, None, None, None, spec, grad, False)
        true = divergence_of_logprobs(student_logprobs, teacher_logprobs, divergence)
        name = f"divergence_rows {divergence} [{rows}, {vocab}]"
        yield Op(name, order, partial(_error_of, outputs.value, checked, true))
    chosen = distinct_zipf_ids(rows, vocab, ids, device)
    plain = logprob_rows.Spec(1.0, None, 1.0)
    order, by_ids = logprob_rows.launches(student, None, chosen, plain, None, grad, False)
    true = student_logprobs.gather(-1, chosen[checked])
    yield Op(f"logprob_rows M = {ids} [{rows}, {vocab}]", order, partial(_error_of, by_ids.logprobs, checked, true))


def distinct_zipf_ids(rows: int, vocab: int, count: int, device: torch.device) -> Tensor:
    """Draw ids [N, M], no one twice in a row, by Zipf's law, as those of a tokenizer stand in top-k rows: the commonest in
    nearly all of them."""
    weights = 1.0 / torch.arange(1, vocab + 1, dtype=torch.float64)
    parts = [
        torch.multinomial(weights.float().to(device).expand(part.numel(), vocab), count)
        for part in torch.arange(rows).split(ZIPF_ROWS)
    ]
    return torch.cat(parts)


def weighted_ops(case: Case, ids: int, device: torch.device, dtype: torch.dtype) -> Iterator[Op]:
    """Yield the ids' part of a gradient, for all N rows."""
    from topd_kernels.weighted_gather import launches as weighted_gather
    from topd_kernels.weighted_scatter import launches as weighted_scatter

    generator = torch.Generator(device).manual_seed(0)
    chosen = distinct_zipf_ids(case.n, case.vocab, ids, device)
    weights = torch.empty(case.n, ids, device=device).normal_(generator=generator)
    shape = f"[{case.n}, {ids}], H = {case.student_width}"
    states, table = (torch.randn(size, case.student_width, dtype=dtype, device=device) for size in (case.n, case.vocab))
    rows = few(case.n, ROWS, device)
    sums = torch.zeros(case.n, case.student_width, device=device)
    gathered = torch.einsum("rm,rmh->rh", weights[rows].double(), table[chosen[rows]].double())
    launches = weighted_gather.launches(sums, table, chosen, weights)
    yield Op(f"weighted_gather {shape}", launches, partial(_error_of, sums, rows, gathered))
    entries = chosen[rows, 0]
    hits = torch.where(chosen.unsqueeze(-1) == entries, weights.unsqueeze(-1), 0.0).sum(1)  # [N, R]
    scattered = hits.double().T @ states.double()
    target = torch.zeros(case.vocab, case.student_width, device=device)
    launches = weighted_scatter.launches(target, states, chosen, weights)
    yield Op(f"weighted_scatter {shape}", launches, partial(_error_of, target, entries, scattered))


def transport_op(m: int, window: int, width: int, device: torch.device) -> Op:
    """Return the transport between window pairs; its error is that of a row's sum, in units of its marginal."""
    from topd_kernels.transport import launches as transport

    student, teacher, table = (part.to(device) for part in make_pairs(m, window, width))
    lengths = torch.full((m,), window, device=device)
    sides = (table, student, lengths, table, teacher, lengths)
    order, (_, plan, _) = transport.launches(*sides, "cosine", 0.05, 200, 1e-4)
    return Op(
        f"transport {m} x {window} x {window}, d = {width}", order, lambda: float((plan.sum(-1) * window - 1).abs().max())
    )


def label(launch: Any) -> str:
    """Return a kernel's name; which of two sweeps."""
    return f"{launch.name}{', gradient' if launch.constants.get('GRAD') else ''}"


def kernel_rows(op: Op, clock: DeviceClock, rounds: int, rates: Rates) -> Iterator[KernelRow]:
    """Yield each launch on its own; all of them run once before, in order, so that each finds what the others left."""
    for launch in op.launches:
        launch.run()
    error = op.error()
    if not error < LIMIT:
        yield KernelRow(op.name, "-", None, None, None, None, f"wrong: off by {error:.1e}, not timed")
        return
    for launch in op.launches:
        size = launch.moved_bytes
        time_ms = times_ms(interleave({"kernel": launch.run}, rounds, clock, warm_up=False)["kernel"])
        yield KernelRow(op.name, label(launch), time_ms, size, rates.byte_ms(launch), rates.issue_ms(launch))
