"""The cases `divergence` and `logprobs`: time of value plus gradients of the mean over tokens, beside the bare matrix products.

Each peer is called once and its result judged (agreement.py); what is wrong, fails or takes too long is a row that says so, and
is not timed. The others then take turns. "floor" are the loss's matrix products by torch.mm, "warm_floor" the same into buffers
that stay allocated, so that not one page is faulted in.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace

from topd_bench.agreement import Errors, Truth, is_wrong, limits_of, whole_truth
from topd_bench.cases import Case, make_inputs
from topd_bench.catalogue import name_of
from topd_bench.cpu.clock import WallClock
from topd_bench.limits import Guarded, first_call, limit_memory
from topd_bench.losses import Workload
from topd_bench.peers import PEERS, differentiable
from topd_bench.peers.floor import floor, warm_floor
from topd_bench.peers.peer import Differentiable
from topd_bench.records import FAILED, MEASURED, SKIPPED, WRONG, now_record, row_record
from topd_bench.report import note, scientific
from topd_bench.request import DTYPES, Request
from topd_bench.runner import Record
from topd_bench.timing import Contender, Sample, Spread, ratio, times_ms, whole_rounds

HEADER = (
    "N", "V", "loss", "head", "peer", "time_ms", "/ floor", "/ topd", "Gflop/s", "value error", "d hidden error",
    "d weight error", "page faults", "note",
)  # fmt: skip
LONG_ROUND_SECONDS = 20.0  # a round that takes longer is not run only to be warm


@dataclass(frozen=True)
class LossRow:
    """One peer in one line. What was not measured is None, and `note` says why.

    `gemm_flop` are those of the loss's matrix products, `least_bytes` what must be read and written at least: every input and
    every gradient once.
    """

    case: str
    shape: Case
    dtype: str
    head: str
    loss: str
    malloc: str
    peer: str
    gemm_flop: int
    least_bytes: int
    status: str = SKIPPED
    note: str = ""
    time_ms: Spread | None = None
    ratios: dict[str, Spread] = field(default_factory=dict)
    value_error: float | None = None
    hidden_error: float | None = None
    weight_error: float | None = None
    page_faults: float | None = None
    samples_ms: list[float] = field(default_factory=list)

    def judged(self, errors: Errors) -> "LossRow":
        """Return the row with a peer's errors."""
        return replace(self, value_error=errors.value, hidden_error=errors.hidden, weight_error=errors.weight)

    def cells(self) -> list[str]:
        """Return its cells under HEADER; Gflop/s are those of the loss's products, whatever a peer multiplies besides."""
        rate = "-" if self.time_ms is None else f"{self.gemm_flop / self.time_ms.median / 1e6:.0f}"
        ratios = [str(self.ratios[name]) if name in self.ratios else "-" for name in ("floor", "ours")]
        errors = [scientific(error) for error in (self.value_error, self.hidden_error, self.weight_error)]
        faults = "-" if self.page_faults is None else f"{self.page_faults:.0f}"
        time = "-" if self.time_ms is None else f"{self.time_ms.median:.1f}"
        place = [f"{self.shape.n:,}", f"{self.shape.vocab:,}", self.loss, self.head, name_of(self.peer)]
        return [*place, time, *ratios, rate, *errors, faults, self.note]

    def record(self) -> Record:
        """Return the line that a job sends; it is a failure where topd was to be timed and was not."""
        shape = self.shape
        widths = f"H {shape.student_width:,} (teacher {shape.teacher_width:,})"
        heading = f"{self.case}, {shape.name}: {widths}, {self.dtype}, malloc {self.malloc}"
        failed = self.peer == "ours" and self.status in (FAILED, WRONG)
        return row_record(heading, HEADER, self.cells(), asdict(self), failed=failed)


def work(request: Request) -> Iterator[Record]:
    """Yield the rows of one shape, loss and head, in the order of the peers."""
    case, trainable, dtype = request.sizes, request.head == "trainable", DTYPES[request.dtype]
    inputs = make_inputs(case, trainable_head=trainable).to(dtype)
    workload = Workload.of(inputs, request.loss)
    flop = case.gemm_flop(trainable_head=trainable, teacher=workload.has_teacher)
    least = case.least_bytes(trainable_head=trainable, teacher=workload.has_teacher, itemsize=dtype.itemsize)
    about = (request.case, case, request.dtype, request.head, request.loss, request.malloc)
    limit_gib = limit_memory(request.limit_gib)
    note(f"{request.place()}: the truth in float64")
    truth = whole_truth(workload)
    names = [name for name in PEERS if request.peers is None or name in request.peers]
    contenders, refusals = differentiable(workload, request.backend, [name for name in names if name not in request.skip])
    reasons = request.skip | refusals
    floors = {"floor": lambda: floor(inputs, request.loss), "warm_floor": lambda: warm_floor(inputs, request.loss)}
    if not request.warm_floor:
        del floors["warm_floor"]
    rows = {name: LossRow(*about, name, flop, least) for name in (*floors, *names)}
    runs: dict[str, Guarded] = {}
    seconds = 0.0
    for name in names:
        if name in reasons:
            rows[name] = replace(rows[name], note=reasons[name])
            continue
        yield now_record(name)
        note(f"{request.place()}: checking {name}")
        rows[name], taken = _checked(rows[name], contenders[name], truth, request, limit_gib)
        if rows[name].status == MEASURED:
            runs[name] = Guarded(contenders[name], limit_gib)
            seconds += taken
    yield now_record("")
    for name in floors:
        built = first_call(floors[name], limit_gib)
        if built.why:
            rows[name] = replace(rows[name], status=FAILED, note=built.why)
        else:
            runs[name] = Guarded(floors["floor"] if name == "floor" else built.result, limit_gib)
        del built
    yield from (row.record() for row in _timed(rows, runs, request, warm_up=seconds < LONG_ROUND_SECONDS))


def _checked(
    row: LossRow, contender: Differentiable, truth: Truth, request: Request, limit_gib: float | None
) -> tuple[LossRow, float]:
    """Call a peer once and judge its result; return its row, measured or not, and the seconds of a call."""
    call = first_call(contender, limit_gib)
    if call.why:
        return replace(row, status=FAILED, note=call.why), call.seconds
    errors, limits = truth.errors(call.result), limits_of(row.peer, DTYPES[request.dtype])
    row = row.judged(errors)
    if is_wrong(errors, limits):
        return replace(row, status=WRONG, note=f"wrong: off by more than {limits.value:g}, not timed"), call.seconds
    if call.seconds > request.limit_seconds:
        call = first_call(contender, limit_gib)  # the first one may have compiled
    if call.seconds > request.limit_seconds:
        return replace(row, note=f"a call takes {call.seconds:.0f} s, the limit is {request.limit_seconds:g} s"), call.seconds
    return replace(row, status=MEASURED), call.seconds


def _timed(rows: dict[str, LossRow], runs: dict[str, Guarded], request: Request, *, warm_up: bool) -> Iterator[LossRow]:
    """Let the peers take turns; yield every row, the floors' first."""
    order: dict[str, Contender] = {name: runs[name] for name in rows if name in runs}
    place = request.place()
    samples, complete = whole_rounds(order, request.rounds, WallClock(), lambda text: note(f"{place}: {text}"), warm_up=warm_up)
    for name, row in rows.items():
        taken = samples.get(name, [])
        if name not in runs:
            yield row
        elif runs[name].why:
            yield replace(row, status=FAILED, note=runs[name].why)
        elif not taken:
            yield replace(row, status=SKIPPED, note="interrupted before a whole round")
        else:
            counted = "" if complete else f"interrupted: {len(taken)} of {request.rounds} rounds"
            others = [other for other in ("floor", "warm_floor", "ours") if other in runs and not runs[other].why]
            yield _with_times(row, taken, {other: samples[other] for other in others if other != name}, counted)
    if not complete:
        raise KeyboardInterrupt


def _with_times(row: LossRow, taken: list[Sample], others: dict[str, list[Sample]], counted: str) -> LossRow:
    return replace(
        row,
        status=MEASURED,
        note=counted,
        time_ms=times_ms(taken),
        ratios={name: ratio(taken, samples) for name, samples in others.items()},
        page_faults=Spread.of([sample.page_faults for sample in taken]).median,
        samples_ms=[sample.time_ms for sample in taken],
    )
