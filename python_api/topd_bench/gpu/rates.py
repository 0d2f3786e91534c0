"""The rates of a device: a copy's, and those of the very products that a chunk runs, by how many rows it has."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from topd.ops.shared.tiles import addmm, mm
from topd_bench.cases import Case
from topd_bench.gpu.clock import COPY_BYTES, DeviceClock
from topd_bench.timing import interleave, times_ms

HEADER = ("what", "shape", "time_ms", "rate")
CHUNK_ROWS = (512, 1024, 2048, 4096)
ROUNDS = 5


class RateRow(NamedTuple):
    """One rate: what, of which shape, its time, and GB or TFLOP a second."""

    what: str
    shape: str
    time_ms: float
    rate: float
    unit: str

    def cells(self) -> list[str]:
        """Return its cells under HEADER."""
        return [self.what, self.shape, f"{self.time_ms:.3f}", f"{self.rate:.0f} {self.unit}"]

    def row(self) -> dict[str, Any]:
        return self._asdict()


def copy_row(clock: DeviceClock) -> RateRow:
    """Return the rate of a copy, bytes read and bytes written."""
    rate = clock.copy_bandwidth()
    return RateRow("copy", f"{COPY_BYTES >> 20} MiB", 2 * COPY_BYTES / rate * 1e3, rate / 1e9, "GB/s")


def product_rows(case: Case, clock: DeviceClock, dtype: torch.dtype) -> Iterator[RateRow]:
    """Yield the rates of a chunk's three products on the student's head, for chunks of several sizes, and of the floor's first
    one, whose result has 16 bits."""
    vocab, width, device = case.vocab, case.student_width, clock.device
    hidden, weight = (torch.empty(size, width, dtype=dtype, device=device).normal_(0, 0.02) for size in (case.n, vocab))
    whole: dict[str, Callable[[], object]] = {"floor's logits": partial(torch.mm, hidden, weight.T)}
    yield from _timed(whole, f"[{case.n}, {width}] x [{width}, {vocab}]", 2 * case.n * vocab * width, clock)
    head = torch.zeros(vocab, width, device=device)
    for rows in [*(rows for rows in CHUNK_ROWS if rows < case.n), case.n]:
        states, tile = hidden[:rows], torch.empty(rows, vocab, device=device)
        # No zeros: a device runs faster on them.
        dlogits = torch.empty(rows, vocab, dtype=dtype, device=device).normal_(0, 1e-3)
        u = torch.empty(rows, width, device=device)
        products: dict[str, Callable[[], object]] = {
            "logits": partial(mm, tile, states, weight.T),
            "d hidden": partial(addmm, u, dlogits, weight, beta=0.0),
            "d weight": partial(addmm, head, dlogits.T, states),
        }
        yield from _timed(products, f"{rows} rows, V = {vocab}, H = {width}", 2 * rows * vocab * width, clock)
        del tile, dlogits, u, products
        clock.release()


def _timed(runs: dict[str, Callable[[], object]], shape: str, flop: int, clock: DeviceClock) -> Iterator[RateRow]:
    for run in runs.values():
        run()
    for what, samples in interleave(runs, ROUNDS, clock, warm_up=False).items():
        time_ms = max(times_ms(samples).median, 1e-9)
        yield RateRow(what, shape, time_ms, flop / time_ms / 1e9, "TFLOP/s")
