"""What the jobs of `python -m topd_bench.gpu` measure, in their order: what must not be missing first, what may fault last."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from topd.files import write_json
from topd_bench.cases import Case, Inputs
from topd_bench.gpu import correctness, kernels, rates, tune
from topd_bench.gpu.clock import Budget, DeviceClock, FreshClock
from topd_bench.gpu.floors import Rates
from topd_bench.gpu.lines import Line, fitted, loss_line, own_line, score_line, transport_line
from topd_bench.gpu.report import plain, record
from topd_bench.gpu.times import Wanted, all_rows, measure
from topd_bench.machine import gpu_facts
from topd_bench.runner import Record

IDS, TRANSPORT = 50, (218, 50, 2560)
CHUNK_ROWS, KERNEL_ROUNDS = 1024, 9
COMPILE_SECONDS = 12.0  # a line that has less does without torch.compile
WITH_TEACHER, WITHOUT_TEACHER = ("reverse_kl", "jsd"), ("logprobs_1", "logprobs_50")


@dataclass(frozen=True)
class Run:
    """What a job is given: the device, the shapes, rounds a line at most, the models' dtype, its seconds, and whether the best
    block sizes are kept."""

    device: torch.device
    shapes: tuple[Case, ...]
    rounds: int
    seconds: float
    keep: bool = False
    dtype: torch.dtype = torch.bfloat16

    @property
    def first_shape(self) -> Case:
        """Return the first shape, as it fits into the memory that is free."""
        return fitted(self.shapes[0], DeviceClock(self.device).free_bytes(), self.dtype.itemsize)[0]


def device_lines(run: Run) -> Iterator[Record]:
    """Yield versions and facts, the rate of a copy, and those of a chunk's products."""
    import topd

    facts = gpu_facts(run.device) | {f"backend {name}": backend.detail for name, backend in topd.backends().items()}
    if run.device.type == "cuda":
        from topd_kernels.shared.blocks import described

        facts["block sizes"] = described(run.device)
    for name, value in facts.items():
        if value is not None:
            yield plain("facts", name, str(value))
    clock = DeviceClock(run.device)
    yield record("rates", rates.copy_row(clock))
    for row in rates.product_rows(run.first_shape, clock, run.dtype):
        yield record("rates", row)


def loss_lines(run: Run) -> Iterator[Record]:
    """Yield topd beside the floor, at the default workspace and at a small one."""
    first = [Wanted(loss, "trainable", _own("trainable", loss)) for loss in WITH_TEACHER]
    more = [Wanted(loss, "trainable", _own("trainable", loss)) for loss in WITHOUT_TEACHER]
    more.append(Wanted("reverse_kl", "frozen", _own("frozen", "reverse_kl")))
    shapes = [(run.shapes[0], [*first, *more]), *((case, first) for case in run.shapes[1:])]
    yield from _timed(shapes, run)


def _own(head: str, loss: str) -> Callable[[Case, Inputs, float], Line]:
    return lambda case, inputs, seconds: own_line(case, inputs, head, loss)


def kernel_lines(run: Run) -> Iterator[Record]:
    """Yield each kernel beside its floors."""
    clock = DeviceClock(run.device)
    measured = Rates.of(clock)
    for op in _kernel_ops(run):
        for row in kernels.kernel_rows(op, clock, KERNEL_ROUNDS, measured):
            yield record("kernels", row)
        del op
        clock.release()


def _kernel_ops(run: Run) -> Iterator[kernels.Op]:
    """Yield the ops whose kernels are timed one by one, at the first shape."""
    case = run.first_shape
    yield from kernels.tile_ops(min(CHUNK_ROWS, case.n), case.vocab, IDS, run.device, run.dtype)
    yield from kernels.weighted_ops(case, IDS, run.device, run.dtype)
    yield kernels.transport_op(*TRANSPORT, run.device)


def peer_lines(run: Run) -> Iterator[Record]:
    """Yield topd beside eager code, torch.compile, TRL, Liger and POT."""
    scores = Wanted("score_tokens", "-", lambda case, inputs, seconds: score_line(case, inputs))
    losses = [Wanted(loss, "trainable", _everyone("trainable", loss)) for loss in (*WITH_TEACHER, *WITHOUT_TEACHER)]
    shapes = [(run.shapes[0], [*losses, scores]), *((case, losses[:2]) for case in run.shapes[1:])]
    yield from _timed(shapes, run, transport=True)


def _everyone(head: str, loss: str) -> Callable[[Case, Inputs, float], Line]:
    return lambda case, inputs, seconds: loss_line(case, inputs, head, loss, compiled=seconds > COMPILE_SECONDS)


def _timed(shapes: list[tuple[Case, list[Wanted]]], run: Run, *, transport: bool = False) -> Iterator[Record]:
    """Yield the lines of shapes in the job's time; the transport, which has no shape of a model, before the other shapes."""
    clock = FreshClock(run.device)
    budget = Budget(run.seconds, sum(len(wanted) for _, wanted in shapes) + transport)
    timed = partial(all_rows, clock=clock, budget=budget, rounds=run.rounds, dtype=run.dtype)
    for row in timed(shapes[:1]):
        yield record("times", row)
    if transport and (share := budget.share()) > 0:
        for row in measure(transport_line(run.device, *TRANSPORT), clock, run.rounds, share):
            yield record("times", row)
    for row in timed(shapes[1:]):
        yield record("times", row)


def tuning_lines(run: Run) -> Iterator[Record]:
    """Yield each kernel's block sizes and warps beside others; write the best ones to the user's file where it is asked for."""
    clock, rows, budget = DeviceClock(run.device), [], Budget(run.seconds, 1)
    for op in _kernel_ops(run):
        for row in tune.tune(op, clock, KERNEL_ROUNDS):
            rows.append(row)
            yield record("tuned", row)
        clock.release()
        if budget.left() <= 0:
            yield plain("facts", "tuning", "stopped: the time is used up; the kernels that follow were not tried")
            break
    if run.keep:
        yield _kept(run.device, rows)


def _kept(device: torch.device, rows: list[tune.TuneRow]) -> Record:
    """Write the user's file; return the line that says so."""
    from topd_kernels.shared import blocks

    name = torch.cuda.get_device_properties(device).name
    path, sizes = blocks.file_of(name), {**blocks.device_of(device).own, **tune.best_sizes(rows)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, blocks.content_of(name, sizes))
    return plain("facts", "block sizes kept", f"{path}: {', '.join(sizes) or 'none is faster than the defaults'}")


class Work(NamedTuple):
    """A job: what yields its lines, and the seconds that it has of a run that has all of them."""

    lines: Callable[[Run], Iterator[Record]]
    seconds: float
    quick: bool = False


JOBS: dict[str, Work] = {
    "device": Work(device_lines, 30, quick=True),
    "losses": Work(loss_lines, 120, quick=True),
    "kernels": Work(kernel_lines, 60, quick=True),
    "tests": Work(lambda run: correctness.all_lines(run.seconds), 100),
    "peers": Work(peer_lines, 90),
    "tuning": Work(tuning_lines, 50),
}
