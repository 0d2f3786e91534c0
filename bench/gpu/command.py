"""Speed of everything on a GPU: `python -m bench.gpu`, under five minutes. Correctness there is `pytest -m gpu`.

    python -m bench.gpu --json gpu.json     timings beside the floor, eager code, torch.compile, TRL and Liger; kernels
    python -m bench.gpu --quick             one shape, one head: about a minute
    python -m bench.gpu --tune              the kernels' block sizes and warps beside others; changes no default

What is timed was first checked on its own inputs. Exit status: 0, 1 where topd is wrong or a timing breaks off, 2 where torch
sees no GPU or Triton cannot use it, 130 after an interrupt. A first run also compiles each kernel, which Triton keeps on disk.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

import topd
from bench.cases import GPU_CASES
from bench.command import INTERRUPTED, parser_of, positive
from bench.gpu import kernels
from bench.gpu.clock import DeviceClock
from bench.gpu.lines import TOKENS, fitted
from bench.gpu.report import Report, header_lines
from bench.gpu.times import Plan, all_rows
from bench.gpu.tune import tune, tune_scores
from bench.machine import gpu_facts
from bench.report import note, write_json

NO_GPU = "no GPU: torch sees no CUDA or ROCm device on this machine; nothing was timed"
NO_DEVICE = 2
LOSSES = ("reverse_kl", "jsd", "logprobs_1", "logprobs_50")
TRANSPORT = (218, 50, 2560)
CHUNK_ROWS, KERNEL_ROUNDS = 1024, 9
SECONDS, QUICK_SECONDS = 200, 40


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    counts = {
        "n": (TOKENS, "tokens; fewer where memory is short"),
        "rounds": (7, "timed rounds a line, at most"),
    }
    parser = parser_of("gpu", __doc__, counts)
    parser.add_argument("--quick", action="store_true", help="one shape, one head: about a minute")
    parser.add_argument(
        "--tune", action="store_true", help="also time other block sizes and warps, which takes minutes; changes no default"
    )
    parser.add_argument("--shape", nargs="+", choices=GPU_CASES, default=None, help="default: all; with --quick the first")
    help_text = f"for the lines of losses (default {SECONDS}, with --quick {QUICK_SECONDS})"
    parser.add_argument("--seconds", type=positive, default=None, help=help_text)
    return parser


def plan_of(arguments: argparse.Namespace) -> Plan:
    """Return what the arguments ask to be timed."""
    names = arguments.shape or (list(GPU_CASES)[:1] if arguments.quick else list(GPU_CASES))
    shapes = tuple(replace(GPU_CASES[name], n=arguments.n) for name in names)
    losses, heads = (("reverse_kl", "logprobs_1"), ("trainable",)) if arguments.quick else (LOSSES, ("trainable", "frozen"))
    return Plan(shapes, losses, heads, arguments.rounds, torch.bfloat16, TRANSPORT, compiled=not arguments.quick)


def refusal() -> str | None:
    """Return why nothing can run here, or None."""
    if not torch.cuda.is_available():
        return NO_GPU
    triton = topd.backends()["triton"]
    if triton.interpreted:
        return "TRITON_INTERPRET is set, so the kernels would run in Triton's interpreter; unset it and run again"
    return None if triton else f"the triton backend is not available: {triton.detail}"


def kernel_ops(plan: Plan, device: torch.device, chunk: int, ids: int) -> Iterator[kernels.Op]:
    """Yield the ops whose kernels are timed one by one, at the first shape."""
    case = plan.shapes[0]
    yield from kernels.tile_ops(min(chunk, case.n), case.vocab, ids, device, plan.dtype)
    yield from kernels.weighted_ops(case, ids, device, plan.dtype)
    if plan.transport is not None:
        yield kernels.transport_op(*plan.transport, device)


def time_kernels(report: Report, plan: Plan, clock: DeviceClock, *, chunk: int, ids: int, with_others: bool) -> None:
    """Time the launches one by one and, with_others, at other block sizes and warps."""
    bandwidth = clock.copy_bandwidth() if clock.device.type == "cuda" else None
    report.copy_gbs = None if bandwidth is None else bandwidth / 1e9
    for op in kernel_ops(plan, clock.device, chunk, ids):
        note(f"kernels of {op.name}")
        report.kernels += kernels.kernel_rows(op, clock, KERNEL_ROUNDS, bandwidth)
        if with_others:
            report.tuned += tune(op, clock, KERNEL_ROUNDS)
        del op
        clock.release()
    for op in kernels.score_ops(plan.shapes[0], clock.device, plan.dtype):
        report.kernels += kernels.kernel_rows(op, clock, KERNEL_ROUNDS, bandwidth)
    if with_others:
        report.tuned.append(tune_scores(plan.shapes[0], clock.device, plan.dtype, clock, KERNEL_ROUNDS))


def run(report: Report, arguments: argparse.Namespace, device: torch.device) -> None:
    """Time the lines of losses in their time, then the kernels."""
    plan, clock = plan_of(arguments), DeviceClock(device)
    for rows in all_rows(plan, clock, arguments.seconds or (QUICK_SECONDS if arguments.quick else SECONDS)):
        report.times += rows
    case, _ = fitted(plan.shapes[0], clock.free_bytes(), plan.dtype.itemsize)
    time_kernels(report, replace(plan, shapes=(case,)), clock, chunk=CHUNK_ROWS, ids=50, with_others=arguments.tune)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    arguments = parser().parse_args(argv)
    if (why := refusal()) is not None:
        note(why)
        return NO_DEVICE
    device = torch.device("cuda", torch.cuda.current_device())
    report, began, status = Report(gpu_facts(device)), time.monotonic(), 0
    print(header_lines(report.machine) + "\n", flush=True)
    try:
        run(report, arguments, device)
    except KeyboardInterrupt:
        report.broken, status = "interrupted", INTERRUPTED
    except Exception as error:  # what was measured before it is worth printing
        report.broken, status = f"{type(error).__name__}: {error}", 1
    report.seconds = time.monotonic() - began
    print(report.tables(), flush=True)
    if arguments.json is not None:
        write_json(arguments.json, report.json())
    return status or int(bool(report.failed))
