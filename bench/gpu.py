"""Correctness and speed of everything on a GPU: `python -m bench.gpu`, under five minutes.

    python -m bench.gpu --json gpu.json     checks, timings beside the floor, eager code, torch.compile, TRL and Liger, kernels
    python -m bench.gpu --quick             one shape, fewer checks: about a minute
    python -m bench.gpu --checks-only       correctness alone
    python -m bench.gpu --tune              the kernels' block sizes and warps beside others; changes no default

Exit status: 0, 1 where a check fails or a timing breaks off, 2 where torch sees no GPU or Triton cannot use it, 130 after an
interrupt. A first run also compiles each kernel, which Triton then keeps on disk.
"""

import argparse
import importlib.metadata
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import topd
from bench import gpu_checks, gpu_judge, gpu_kernels, gpu_times, gpu_tune
from bench.cases import GPU_CASES
from bench.gpu_clock import Clock
from bench.gpu_judge import Check, judge
from bench.gpu_kernels import KernelRow
from bench.gpu_peers import LOSSES, TOKENS, fitted
from bench.gpu_problems import Sizes
from bench.gpu_times import Plan, TimeRow
from bench.gpu_tune import TuneRow
from bench.measure import git_commit
from bench.process import INTERRUPTED, positive
from bench.report import markdown_table, note, write_json

NO_GPU = "no GPU: torch sees no CUDA or ROCm device on this machine; nothing was checked and nothing was timed"
NO_DEVICE = 2
TRANSPORT = (218, 50, 2560)
CHUNK_ROWS, KERNEL_ROUNDS = 1024, 9


def version(package: str) -> str | None:
    """Of an installed distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def clocks(device: int) -> str | None:
    """Driver, clocks and power as nvidia-smi gives them; None where it is not there."""
    asked = "driver_version,clocks.sm,clocks.max.sm,power.draw,power.limit,temperature.gpu"
    command = ["nvidia-smi", f"--id={device}", f"--query-gpu={asked}", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    names = ("driver", "SM clock", "of", "power", "of", "temperature")
    return ", ".join(f"{name} {value.strip()}" for name, value in zip(names, found.split(","), strict=False))


def machine(device: torch.device) -> dict[str, Any]:
    """What a reader needs to judge a number."""
    found: dict[str, Any] = {"device": "CPU, Triton's interpreter"}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        size = f"{properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count} multiprocessors"
        found = {"device": f"{properties.name}, {size}", "clocks": clocks(device.index or 0)}
    return {
        **found,
        "torch": torch.__version__,
        "triton": version("triton"),
        "CUDA": torch.version.cuda,
        "HIP": torch.version.hip,
        "trl": version("trl"),
        "liger": version("liger-kernel"),
        "commit": git_commit(),
        "TF32 in float32 products": torch.backends.cuda.matmul.allow_tf32,
        "bf16 sums in split products": torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
    }


def header_lines(found: dict[str, Any]) -> str:
    """One fact a line."""
    return "\n".join(f"{name}: {value}" for name, value in found.items() if value is not None)


@dataclass
class Report:
    """Everything found so far; printed and written at the end, also of a run that broke off."""

    machine: dict[str, Any]
    checks: list[Check] = field(default_factory=list)
    times: list[TimeRow] = field(default_factory=list)
    kernels: list[KernelRow] = field(default_factory=list)
    tuned: list[TuneRow] = field(default_factory=list)
    copy_gbs: float | None = None
    seconds: float = 0.0
    broken: str = ""

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if not check.ok]

    def tables(self) -> str:
        """What was measured, as Markdown."""
        parts = []
        if self.checks:
            verdict = f"{len(self.checks) - len(self.failed)} of {len(self.checks)} checks hold"
            parts += [f"### checks: {verdict}", markdown_table(gpu_judge.HEADER, [check.cells() for check in self.checks])]
            parts.append((gpu_judge.__doc__ or "").partition("Bounds, ")[2].join(("Bounds: ", "")).rstrip())
        if self.times:
            parts += ["### times", "Medians (smallest-largest); ratios are of the same round. TFLOP/s: the floor's products."]
            parts.append(markdown_table(gpu_times.HEADER, [row.cells() for row in self.times]))
        if self.kernels:
            copied = "" if self.copy_gbs is None else f", a copy moves {self.copy_gbs:.0f} GB/s"
            parts += [f"### kernels{copied}", markdown_table(gpu_kernels.HEADER, [row.cells() for row in self.kernels])]
        if self.tuned:
            parts += ["### block sizes and warps", markdown_table(gpu_tune.HEADER, [row.cells() for row in self.tuned])]
        parts += [f"Broke off: {self.broken}"] if self.broken else []
        return "\n\n".join([*parts, f"{self.seconds:.0f} s"])

    def json(self) -> dict[str, Any]:
        """The same for a file."""
        lists = {name: [row.row() for row in getattr(self, name)] for name in ("checks", "times", "kernels", "tuned")}
        facts = {"complete": not self.broken, "broken": self.broken, "seconds": self.seconds, "copy_gbs": self.copy_gbs}
        return {"benchmark": "gpu", "machine": self.machine, **facts, "failed": len(self.failed), **lists}


def check_all(report: Report, sizes: Sizes, device: torch.device, *, quick: bool) -> None:
    for evidence in gpu_checks.evidence(sizes, device, quick=quick):
        report.checks.append(judge(evidence))
        if not report.checks[-1].ok:
            note(f"FAILED: {' | '.join(report.checks[-1].cells())}")


def time_all(report: Report, plan: Plan, clock: Clock, seconds: float) -> None:
    def free() -> int:
        return torch.cuda.mem_get_info(clock.device)[0] if clock.device.type == "cuda" else 1 << 62

    for rows in gpu_times.all_rows(plan, clock, seconds, free):
        report.times += rows
        report.checks += gpu_times.verdict(rows, plan.dtype)


def kernel_ops(plan: Plan, device: torch.device, chunk: int, ids: int) -> Iterator[gpu_kernels.Op]:
    """The ops whose kernels are timed one by one, at the first shape."""
    case = plan.shapes[0]
    yield from gpu_kernels.tile_ops(min(chunk, case.n), case.vocab, ids, device, plan.dtype)
    yield from gpu_kernels.weighted_ops(case, ids, device, plan.dtype)
    if plan.transport is not None:
        yield gpu_kernels.transport_op(*plan.transport, device)


def time_kernels(report: Report, plan: Plan, clock: Clock, *, chunk: int, ids: int, tune: bool) -> None:
    if clock.device.type == "cuda":
        bandwidth = clock.copied()
        report.copy_gbs = bandwidth / 1e9
    held = None if report.copy_gbs is None else report.copy_gbs * 1e9
    for op in kernel_ops(plan, clock.device, chunk, ids):
        note(f"kernels of {op.name}")
        report.kernels += gpu_kernels.kernel_rows(op, clock, KERNEL_ROUNDS, held)
        if tune:
            report.tuned += gpu_tune.tune(iter([op]), clock, KERNEL_ROUNDS)
        del op
        clock.release()
    for op in gpu_kernels.score_ops(plan.shapes[0], clock.device, plan.dtype):
        report.kernels += gpu_kernels.kernel_rows(op, clock, KERNEL_ROUNDS, held)
    if tune:
        report.tuned.append(gpu_tune.tune_scores(plan.shapes[0], clock.device, plan.dtype, clock, KERNEL_ROUNDS))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").partition("\n")[0])
    found.add_argument("--quick", action="store_true", help="one shape, one head, fewer checks: about a minute")
    found.add_argument("--checks-only", action="store_true", help="no timings")
    found.add_argument(
        "--tune", action="store_true", help="also time other block sizes and warps, which takes minutes; changes no default"
    )
    found.add_argument("--shape", nargs="+", choices=GPU_CASES, default=None, help="default: all; with --quick the first")
    found.add_argument("--n", type=positive, default=TOKENS, help=f"tokens (default {TOKENS}; fewer where memory is short)")
    found.add_argument("--rounds", type=positive, default=7, help="timed rounds a line, at most (default 7)")
    found.add_argument(
        "--seconds",
        type=positive,
        default=None,
        help="for the timings (default: what the checks left of five minutes, with --quick of one)",
    )
    found.add_argument("--json", type=Path, default=None, metavar="PATH", help="also write everything there")
    return found


def plan_of(arguments: argparse.Namespace) -> Plan:
    """What the arguments ask to be timed."""
    names = arguments.shape or (list(GPU_CASES)[:1] if arguments.quick else list(GPU_CASES))
    shapes = tuple(replace(GPU_CASES[name], n=arguments.n) for name in names)
    losses, heads = (("reverse_kl", "logprobs_1"), ("trainable",)) if arguments.quick else (LOSSES, ("trainable", "frozen"))
    return Plan(shapes, losses, heads, arguments.rounds, torch.bfloat16, TRANSPORT, compiled=not arguments.quick)


def refusal() -> str | None:
    """Why nothing can run here, or None."""
    if not torch.cuda.is_available():
        return NO_GPU
    triton = topd.backends()["triton"]
    if triton.interpreted:
        return "TRITON_INTERPRET is set, so the kernels would run in Triton's interpreter; unset it and run again"
    return None if triton else f"the triton backend is not available: {triton.detail}"


def run(report: Report, arguments: argparse.Namespace, device: torch.device) -> None:
    """Checks, then timings in what the checks leave of the time, the kernels last."""
    began = time.monotonic()
    check_all(report, Sizes(), device, quick=arguments.quick)
    if arguments.checks_only:
        return
    plan, clock = plan_of(arguments), Clock(device)
    left = (60 if arguments.quick else 265) - (time.monotonic() - began)
    time_all(report, plan, clock, arguments.seconds or max(left, 25 if arguments.quick else 90))
    case, _ = fitted(plan.shapes[0], torch.cuda.mem_get_info(device)[0], plan.dtype.itemsize)
    time_kernels(report, replace(plan, shapes=(case,)), clock, chunk=CHUNK_ROWS, ids=50, tune=arguments.tune)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    arguments = parser().parse_args(argv)
    if (why := refusal()) is not None:
        note(why)
        return NO_DEVICE
    device = torch.device("cuda", torch.cuda.current_device())
    report, began, status = Report(machine(device)), time.monotonic(), 0
    print(header_lines(report.machine) + "\n", flush=True)
    try:
        run(report, arguments, device)
    except KeyboardInterrupt:
        report.broken, status = "interrupted", INTERRUPTED
    except Exception as error:  # what was found before it is worth printing
        report.broken, status = f"{type(error).__name__}: {error}", 1
    report.seconds = time.monotonic() - began
    print(report.tables(), flush=True)
    if arguments.json is not None:
        write_json(arguments.json, report.json())
    return status or int(bool(report.failed))


if __name__ == "__main__":
    sys.exit(main())
