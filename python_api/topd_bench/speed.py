"""Time of value plus gradients beside the floor, eager code, TRL and Liger: `python -m topd_bench.speed`.

float32 or bfloat16 (--dtype), the mean over tokens, trainable head (4 matrix products, 3 without a teacher) and frozen head
(one less). Each allocator setting runs in a process of its own; results are checked before they are timed, then contenders
take turns for --rounds rounds.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from topd.backends import NAMES, choose_backend
from topd.options import BackendName
from topd_bench.agreement import DisagreementError, Errors, measure_errors, refuse_wrong
from topd_bench.cases import CASES, make_inputs
from topd_bench.command import INTERRUPTED, parser_of
from topd_bench.cpu.clock import WallClock
from topd_bench.cpu.process import MALLOC_MODES, Outcome, options, run_worker
from topd_bench.losses import LOSSES, Workload
from topd_bench.machine import cpu_facts
from topd_bench.peers import CONTENDERS, differentiable
from topd_bench.peers.floor import floor, warm_floor
from topd_bench.report import machine_line, markdown_table, note, scientific, write_json
from topd_bench.timing import Contender, Spread, interleave, ratio, times_ms

HEADS = ("trainable", "frozen")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TIMED = ("floor", "warm_floor", *CONTENDERS)
RATIOS = (("ours", "floor"), ("ours", "warm_floor"), *((name, "ours") for name in CONTENDERS if name != "ours"))
TIME_HEADER = (
    "case",
    "dtype",
    "head",
    "loss",
    "GEMMs",
    "floor GFLOP/s",
    *(f"{name} time_ms" for name in TIMED),
    *(f"{above}/{below}" for above, below in RATIOS),
)
CHECK_HEADER = (
    "case",
    "dtype",
    "head",
    "loss",
    *(f"{part} error {name}" for part in ("value", "dH") for name in CONTENDERS),
    *(f"dW {name}" for name in CONTENDERS),
    *(f"faults {name}" for name in TIMED),
)


@dataclass(frozen=True)
class SpeedRow:
    """One line of the tables: times, errors and page faults a call by contender, ratios by "above/below"."""

    case: str
    dtype: str
    head: str
    loss: str
    gemm_count: int
    gemm_flop: int
    time_ms: dict[str, Spread]
    ratios: dict[str, Spread]
    errors: dict[str, Errors]
    page_faults: dict[str, Spread]
    samples_ms: dict[str, list[float]]

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "SpeedRow":
        """Read what dataclasses.asdict wrote."""
        spreads = {
            key: {name: Spread(**spread) for name, spread in data[key].items()} for key in ("time_ms", "ratios", "page_faults")
        }
        return cls(**(data | spreads | {"errors": {name: Errors(**errors) for name, errors in data["errors"].items()}}))

    def time_cells(self) -> list[str]:
        """Return its cells under TIME_HEADER."""
        gflops = self.gemm_flop / self.time_ms["floor"].median / 1e6
        times = [f"{self.time_ms[name].median:.1f}" if name in self.time_ms else "-" for name in TIMED]
        pairs = [f"{above}/{below}" for above, below in RATIOS]
        ratios = [str(self.ratios[pair]) if pair in self.ratios else "-" for pair in pairs]
        return [self.case, self.dtype, self.head, self.loss, str(self.gemm_count), f"{gflops:.0f}", *times, *ratios]

    def check_cells(self) -> list[str]:
        """Return its cells under CHECK_HEADER."""
        parts: list[float | None] = []
        for part in ("value", "hidden", "weight"):
            parts += [getattr(self.errors[name], part) if name in self.errors else None for name in CONTENDERS]
        faults = [f"{self.page_faults[name].median:.0f}" if name in self.page_faults else "-" for name in TIMED]
        return [self.case, self.dtype, self.head, self.loss, *map(scientific, parts), *faults]


def measure_row(case_name: str, dtype: str, head: str, loss: str, *, backend: BackendName, rounds: int, label: str) -> SpeedRow:
    """Check one shape, dtype, head and loss, then time it."""
    case, trainable = CASES[case_name], head == "trainable"
    inputs = make_inputs(case, trainable_head=trainable).to(DTYPES[dtype])
    workload = Workload.of(inputs, loss)
    where = f"{label} {case_name} {dtype} {head} {loss}"
    note(f"{where}: checking")
    checked = differentiable(workload, backend)
    errors = measure_errors(workload, {name: contender() for name, contender in checked.items()})
    refuse_wrong(errors, DTYPES[dtype])
    contenders: dict[str, Contender] = {
        "floor": lambda: floor(inputs, loss),
        "warm_floor": warm_floor(inputs, loss),
        **checked,
    }
    samples = interleave(contenders, rounds, WallClock(), lambda text: note(f"{where}: {text}"))
    return SpeedRow(
        case=case_name,
        dtype=dtype,
        head=head,
        loss=loss,
        gemm_count=case.gemm_count(trainable_head=trainable, teacher=workload.has_teacher),
        gemm_flop=case.gemm_flop(trainable_head=trainable, teacher=workload.has_teacher),
        time_ms={name: times_ms(each) for name, each in samples.items()},
        ratios={f"{a}/{b}": ratio(samples[a], samples[b]) for a, b in RATIOS if a in samples and b in samples},
        errors=errors,
        page_faults={name: Spread.of([sample.page_faults for sample in each]) for name, each in samples.items()},
        samples_ms={name: [sample.time_ms for sample in each] for name, each in samples.items()},
    )


def work(arguments: argparse.Namespace, path: Path) -> None:
    """Measure every combination asked for, as a worker; the report is rewritten after each."""
    backend = choose_backend(arguments.backend, torch.device("cpu"))
    facts = cpu_facts(backend, arguments.malloc)
    rows: list[dict[str, Any]] = []
    for case in arguments.case:
        for head in arguments.head:
            for loss in arguments.loss:
                where = (case, arguments.dtype, head, loss)
                row = measure_row(*where, backend=backend, rounds=arguments.rounds, label=arguments.malloc)
                rows.append(asdict(row))
                write_json(path, {"machine": facts, "rows": rows})


def print_report(malloc: str, outcome: Outcome) -> None:
    """Print the tables of one allocator setting."""
    if outcome.report is None:
        return
    rows = [SpeedRow.from_json(row) for row in outcome.report["rows"]]
    print(f"\n### malloc {malloc}{' (incomplete)' if outcome.status else ''}\n")
    print(machine_line(outcome.report["machine"]))
    print("\nTimes are medians; ratios are medians of the rounds' ratios (smallest-largest).\n")
    print(markdown_table(TIME_HEADER, [row.time_cells() for row in rows]))
    print("\nLargest relative errors (value, dH: against fp64; dW: against eager in float32), page faults a call (median).\n")
    print(markdown_table(CHECK_HEADER, [row.check_cells() for row in rows]), flush=True)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = parser_of("speed", __doc__, {"rounds": (5, "timed rounds a line")})
    parser.add_argument("--case", nargs="+", choices=CASES, default=["smollm2", "qwen"])
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of hidden states and heads (default float32)")
    parser.add_argument("--head", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--loss", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--backend", choices=NAMES, default=None, help="topd's backend (default: by device)")
    parser.add_argument("--malloc", choices=(*MALLOC_MODES, "both"), default="both", help="allocator settings")
    parser.add_argument("--worker", type=Path, default=None, help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status is 130 after an interrupt, 1 after a failure."""
    arguments = parser().parse_args(argv)
    if arguments.worker is not None:
        try:
            work(arguments, arguments.worker)
        except KeyboardInterrupt:
            return INTERRUPTED
        except DisagreementError as error:
            note(f"error: {error}")
            return 1
        return 0
    chosen = {key: getattr(arguments, key) for key in ("rounds", "case", "dtype", "head", "loss", "backend")}
    reports: list[dict[str, Any]] = []
    status = 0
    for malloc in MALLOC_MODES if arguments.malloc == "both" else (arguments.malloc,):
        outcome = run_worker("topd_bench.speed", options(chosen | {"malloc": malloc}), malloc=malloc)
        print_report(malloc, outcome)
        reports += [outcome.report] if outcome.report else []
        status = outcome.status
        if status:
            break
    if arguments.json is not None:
        report = {"benchmark": "speed", "options": chosen, "complete": not status, "reports": reports}
        write_json(arguments.json, report)
    return status


if __name__ == "__main__":
    sys.exit(main())
