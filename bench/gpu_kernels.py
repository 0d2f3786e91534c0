"""Each Triton launch by name: its time, and the bytes that it declares, over that time, as a share of a copy's bandwidth."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.cases import Case
from bench.gpu_clock import Clock, spread_ms
from bench.gpu_problems import Sizes, transported
from bench.measure import Spread

HEADER = ("op", "kernel", "time_ms", "MiB moved", "GB/s", "of a copy", "note")


class Op(NamedTuple):
    """The launches of one call of an op."""

    name: str
    launches: list[Any]


@dataclass(frozen=True)
class KernelRow:
    """One launch."""

    op: str
    kernel: str
    time_ms: Spread | None
    moved_bytes: int
    share_of_copy: float | None
    note: str = ""

    def cells(self) -> list[str]:
        """Its cells under HEADER."""
        place = [self.op, self.kernel]
        if self.time_ms is None:
            return [*place, "-", "-", "-", "-", self.note]
        rate = self.moved_bytes / max(self.time_ms.median, 1e-9) / 1e6
        share = "-" if self.share_of_copy is None else f"{self.share_of_copy:.0%}"
        median, low, high = self.time_ms.median, self.time_ms.low, self.time_ms.high
        return [
            *place,
            f"{median:.3f} ({low:.3f}-{high:.3f})",
            f"{self.moved_bytes / 2**20:.1f}",
            f"{rate:.0f}",
            share,
            self.note,
        ]

    def row(self) -> dict[str, Any]:
        return asdict(self)


def tile_ops(rows: int, vocab: int, ids: int, device: torch.device, dtype: torch.dtype) -> Iterator[Op]:
    """The row ops on a chunk [rows, vocab] of float32 tiles, gradients in the models' dtype."""
    from topd_kernels.divergence_rows import launches as divergence_rows
    from topd_kernels.logprob_rows import launches as logprob_rows

    generator = torch.Generator(device).manual_seed(0)
    student, teacher = (torch.empty(rows, vocab, device=device).normal_(0, 2, generator=generator) for _ in range(2))
    grad = torch.empty(rows, vocab, dtype=dtype, device=device)
    for divergence, parameter in (("reverse_kl", 0.0), ("jsd", 0.5)):
        spec = divergence_rows.Spec(1.0, None, 1.0, None, 1.0, divergence, parameter, 0.0)
        found = divergence_rows.launches(student, teacher, None, None, None, spec, grad, False)[0]
        yield Op(f"divergence_rows {divergence} [{rows}, {vocab}]", found)
    chosen = torch.randint(vocab, (rows, ids), device=device, generator=generator)
    plain = logprob_rows.Spec(1.0, None, 1.0)
    yield Op(
        f"logprob_rows M = {ids} [{rows}, {vocab}]", logprob_rows.launches(student, None, chosen, plain, None, grad, False)[0]
    )


def weighted_ops(case: Case, ids: int, device: torch.device, dtype: torch.dtype) -> Iterator[Op]:
    """The ids' part of a gradient, for all N rows."""
    from topd_kernels.weighted_gather import launches as weighted_gather
    from topd_kernels.weighted_scatter import launches as weighted_scatter

    generator = torch.Generator(device).manual_seed(0)
    at = torch.randint(case.vocab, (case.n, ids), device=device, generator=generator)
    weights = torch.empty(case.n, ids, device=device).normal_(generator=generator)
    states, table = (torch.zeros(size, case.student_width, device=device) for size in (case.n, case.vocab))
    shape = f"[{case.n}, {ids}], H = {case.student_width}"
    yield Op(f"weighted_gather {shape}", weighted_gather.launches(states, table.to(dtype), at, weights))
    yield Op(f"weighted_scatter {shape}", weighted_scatter.launches(table, states.to(dtype), at, weights))


def transport_op(m: int, window: int, width: int, device: torch.device) -> Op:
    from topd_kernels.transport import launches as transport

    sizes = Sizes(vocab=20_000, widths=(width, width), problems=m)
    student, teacher = transported(sizes, device, (window, window, 1e-4))
    found = transport.launches(*student, *teacher, "cosine", 0.05, 200, 1e-4)[0]
    return Op(f"transport {m} x {window} x {window}, d = {width}", found)


def score_ops(
    case: Case, device: torch.device, dtype: torch.dtype, tiles: Sequence[tuple[int, int, int, int] | None] = (None,)
) -> list[Op]:
    """The fused scores, once for each tile; None is the default's."""
    from topd_kernels.score_tokens import launches as score_tokens

    def normal(rows: int, width: int) -> Tensor:
        return torch.empty(rows, width, dtype=dtype, device=device).normal_(0, 0.1)

    sides = [
        score_tokens.Operands(normal(case.n, width), normal(case.vocab, width), None, 1.0, None)
        for width in (case.student_width, case.teacher_width)
    ]
    blocks = [None if tile is None else score_tokens.Blocks(*tile) for tile in tiles]
    student, teacher = sides
    found = [score_tokens.launches(student, teacher, None, 1.0, blocks=tile)[0] for tile in blocks]
    return [Op(f"score_tokens {case.name}, N = {case.n}", launches) for launches in found]


def label(launch: Any) -> str:
    """A kernel's name; which of two sweeps."""
    return f"{launch.name}{', gradient' if launch.constants.get('GRAD') else ''}"


def kernel_rows(op: Op, clock: Clock, rounds: int, bandwidth: float | None) -> Iterator[KernelRow]:
    """Each launch on its own, all of them run once before, in order, so that each finds what the others left."""
    for launch in op.launches:
        launch.run()
    for launch in op.launches:
        size = launch.moved_bytes
        time_ms = spread_ms(clock.interleave({"kernel": launch.run}, rounds)["kernel"])
        share = None if bandwidth is None else size / max(time_ms.median, 1e-9) * 1e3 / bandwidth
        note = "products: the bytes are not what bounds it" if launch.name.startswith("score") else ""
        yield KernelRow(op.name, label(launch), time_ms, size, share, note)
