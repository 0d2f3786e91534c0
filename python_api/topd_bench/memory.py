"""Peak resident memory of value plus gradients, beyond inputs and gradients: `python -m topd_bench.memory`.

Each number comes from a fresh process, which
1. imports everything, then warms up threads, the matrix-product library and autograd on tiny shapes;
2. makes the inputs in place, so that every page of them is resident and no temporary was ever as large;
3. gives the heap's free pages back (malloc_trim) and resets the kernel's high-water mark (/proc/self/clear_refs);
4. reads VmRSS, the baseline: interpreter, libraries, inputs;
5. computes value and gradients once and, with the gradients still alive, reads VmHWM.

peak_mib is VmHWM - baseline, gradients included; beyond_mib is what is left without the bytes of the returned gradients
and may not pass the budget: one fp32 d weight (trainable head) + one fp32 d hidden + the workspace + 64 MiB. What the
matrix-product library keeps for large shapes is not warmed up, so it counts. Allocator settings are glibc's defaults:
blocks above 32 MiB, which are all that matters at 1,024 tokens and more, are mapped one by one and unmapped when freed.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from topd.backends import NAMES, choose_backend
from topd.ops.shared.plan import MIB, default_workspace
from topd.options import BackendName
from topd_bench.cases import CASES, Inputs, make_inputs
from topd_bench.command import INTERRUPTED, parser_of, positive
from topd_bench.cpu.high_water import high_water_mib, settle
from topd_bench.cpu.process import options, run_worker
from topd_bench.losses import LOSSES, Workload
from topd_bench.machine import cpu_facts
from topd_bench.peers import CONTENDERS, differentiable
from topd_bench.report import machine_line, markdown_table, note, write_json

HEADS = ("trainable", "frozen")
SLACK_MIB = 64
HEADER = ("peer", "head", "N", "loss", "peak_mib", "gradients_mib", "beyond_mib", "budget_mib", "within budget")


@dataclass(frozen=True)
class MemoryRow:
    """One measurement; budget_mib holds for ours and is None for the others."""

    peer: str
    head: str
    n: int
    loss: str
    baseline_mib: float
    peak_mib: float
    gradients_mib: float
    beyond_mib: float
    budget_mib: float | None

    def cells(self) -> list[str]:
        """Return its cells under HEADER."""
        sizes = [f"{size:.0f}" for size in (self.peak_mib, self.gradients_mib, self.beyond_mib)]
        if self.budget_mib is None:
            return [self.peer, self.head, str(self.n), self.loss, *sizes, "-", "-"]
        within = "yes" if self.beyond_mib <= self.budget_mib else "NO"
        return [self.peer, self.head, str(self.n), self.loss, *sizes, f"{self.budget_mib:.0f}", within]


def budget_mib(inputs: Inputs) -> float:
    """Return what topd may use beyond inputs and gradients."""
    gradients = sum(tensor.numel() for tensor in inputs.differentiated) * 4
    workspace = inputs.workspace_bytes or default_workspace("cpu")
    return (gradients + workspace) / MIB + SLACK_MIB


def measure(case_name: str, peer: str, head: str, n: int, loss: str, backend: BackendName) -> MemoryRow:
    """Measure once in this process, which should be fresh."""
    trainable = head == "trainable"
    warm_up = make_inputs(CASES["tiny"], trainable_head=trainable)
    differentiable(Workload.of(warm_up, loss), backend)[peer]()
    torch.mm(torch.ones(512, 512), torch.ones(512, 512))
    inputs = make_inputs(replace(CASES[case_name], n=n), trainable_head=trainable)
    contender = differentiable(Workload.of(inputs, loss), backend)[peer]
    baseline_mib = settle()
    result = contender()
    peak_mib = high_water_mib() - baseline_mib
    gradients_mib = sum(grad.nbytes for grad in (result.hidden, result.weight) if grad is not None) / MIB
    return MemoryRow(
        peer=peer,
        head=head,
        n=n,
        loss=loss,
        baseline_mib=baseline_mib,
        peak_mib=peak_mib,
        gradients_mib=gradients_mib,
        beyond_mib=peak_mib - gradients_mib,
        budget_mib=budget_mib(inputs) if peer == "ours" else None,
    )


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = parser_of("memory", __doc__)
    parser.add_argument("--n", nargs="+", type=positive, default=[1024, 2048, 8192], help="tokens")
    parser.add_argument("--case", choices=CASES, default="smollm2", help="the shape whose N is replaced")
    parser.add_argument("--peer", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--head", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--loss", choices=LOSSES, default="reverse_kl")
    parser.add_argument("--eager-max-n", type=positive, default=2048, help="larger N are not tried on eager code")
    parser.add_argument("--backend", choices=NAMES, default=None, help="topd's backend (default: by device)")
    parser.add_argument("--worker", type=Path, default=None, help=argparse.SUPPRESS)
    return parser


def measurements(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the workers' options, one worker a measurement."""
    workers: list[dict[str, Any]] = []
    tiny = Workload.of(make_inputs(CASES["tiny"], trainable_head=False), arguments.loss)
    available = differentiable(tiny, arguments.backend)
    for peer in arguments.peer:
        if peer not in available:
            note(f"{peer} is not installed, or has no {arguments.loss}: left out")
            continue
        common = {
            "peer": peer,
            "case": arguments.case,
            "loss": arguments.loss,
            "backend": arguments.backend,
        }
        for head in arguments.head:
            for n in arguments.n:
                if peer != "eager" or n <= arguments.eager_max_n:
                    workers.append(common | {"head": head, "n": n})
    return workers


def work(arguments: argparse.Namespace, path: Path) -> None:
    """Measure once, as a worker."""
    backend = choose_backend(arguments.backend, torch.device("cpu"))
    asked = (arguments.peer[0], arguments.head[0], arguments.n[0], arguments.loss)
    row = measure(arguments.case, *asked, backend)
    write_json(path, {"machine": cpu_facts(backend), "row": asdict(row)})


def print_reports(case: str, reports: Sequence[dict[str, Any]], *, complete: bool) -> list[MemoryRow]:
    """Print the table of what was measured."""
    rows = [MemoryRow(**report["row"]) for report in reports]
    if rows:
        print(f"\n### memory, {case}{'' if complete else ' (incomplete)'}\n")
        print(machine_line(reports[0]["machine"]) + "\n")
        print(markdown_table(HEADER, [row.cells() for row in rows]), flush=True)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status is 130 after an interrupt, 1 where a worker failed or a budget is exceeded."""
    arguments = parser().parse_args(argv)
    if arguments.worker is not None:
        try:
            work(arguments, arguments.worker)
        except KeyboardInterrupt:
            return INTERRUPTED
        return 0
    reports: list[dict[str, Any]] = []
    status = 0
    for asked in measurements(arguments):
        note(f"{asked['peer']} {asked['head']} N {asked['n']}")
        outcome = run_worker("topd_bench.memory", options(asked))
        reports += [outcome.report] if outcome.report else []
        status = status or outcome.status
        if outcome.status == INTERRUPTED:
            break
    rows = print_reports(arguments.case, reports, complete=not status)
    if arguments.json is not None:
        report = {"benchmark": "memory", "case": arguments.case, "complete": not status}
        first = reports[0]["machine"] if reports else None
        write_json(arguments.json, report | {"machine": first, "rows": [asdict(row) for row in rows]})
    return status or int(any(row.budget_mib is not None and row.beyond_mib > row.budget_mib for row in rows))


if __name__ == "__main__":
    sys.exit(main())
