"""Speed of everything on a GPU, in under nine minutes, every line as it is measured: `python -m topd_bench.gpu`

    PYTHONPATH=python_api:. python -m topd_bench.gpu      from a plain checkout, with the torch and the Triton that are there
    python -m topd_bench.gpu --json FILE                  where every line is also written, as JSON (default gpu.jsonl)
    python -m topd_bench.gpu --jobs device losses         some of the jobs, in the order of all
    python -m topd_bench.gpu --quick                      few tokens, the first three jobs: about a minute and a half
    python -m topd_bench.gpu --tune                       find block sizes and warps for this device and keep them in a file

Jobs are processes of their own, so that a fault of the device ends one of them and not the run. The order: versions and rates;
losses beside the floor; each kernel beside its floors; `pytest -m gpu`; peers; last other block sizes, which may fault. What is
timed was first checked on its own inputs. A first run also compiles each kernel, which Triton keeps on disk.

Exit status: 0, 1 where a result is wrong, a test fails or a job dies, 2 where torch sees no GPU or Triton cannot use it, 130
after Ctrl-C, 143 after SIGTERM.
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

import topd
from topd.cli.errors import INTERRUPTED
from topd.cli.options import positive
from topd_bench.cases import GPU_CASES
from topd_bench.gpu.jobs import JOBS, Run
from topd_bench.gpu.lines import TOKENS
from topd_bench.gpu.report import Report
from topd_bench.report import note
from topd_bench.runner import Job, Runner, speak

NO_GPU = "no GPU: torch sees no CUDA or ROCm device on this machine; nothing was timed"
NO_DEVICE = 2
SECONDS, QUICK_SECONDS, QUICK_TOKENS = 500, 90, 2048
TUNING = ("device", "tuning")


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(prog="python -m topd_bench.gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=positive, default=7, help="timed rounds a line, at most (default 7)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every line there (default gpu.jsonl)")
    help_text = f"tokens; fewer where memory is short (default {TOKENS}, with --quick {QUICK_TOKENS})"
    parser.set_defaults(json=Path("gpu.jsonl"))
    parser.add_argument("--n", type=positive, default=None, help=help_text)
    parser.add_argument("--quick", action="store_true", help="few tokens, the first shape, the first three jobs")
    parser.add_argument("--tune", action="store_true", help="keep the best block sizes and warps in a file that topd reads")
    parser.add_argument("--shape", nargs="+", choices=GPU_CASES, default=None, help="default: all; with --quick the first")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=None, metavar="JOB", help=f"some of: {', '.join(JOBS)}")
    help_text = f"for everything (default {SECONDS}, with --quick {QUICK_SECONDS}); what is not done then is named"
    parser.add_argument("--seconds", type=positive, default=None, help=help_text)
    parser.add_argument("--job", choices=JOBS, default=None, help=argparse.SUPPRESS)  # the process of one job
    return parser


def run_of(arguments: argparse.Namespace, device: torch.device) -> Run:
    """Return what the arguments ask a job to measure."""
    names = arguments.shape or (list(GPU_CASES)[:1] if arguments.quick else list(GPU_CASES))
    n = arguments.n or (QUICK_TOKENS if arguments.quick else TOKENS)
    shapes = tuple(replace(GPU_CASES[name], n=n) for name in names)
    return Run(device, shapes, arguments.rounds, seconds_of(arguments), keep=arguments.tune)


def seconds_of(arguments: argparse.Namespace) -> int:
    """Return the seconds of the run, or of the job."""
    return int(arguments.seconds or (QUICK_SECONDS if arguments.quick else SECONDS))


def names_of(arguments: argparse.Namespace) -> list[str]:
    """Return the jobs that the arguments ask for, in their order."""
    if arguments.jobs is not None:
        return [name for name in JOBS if name in arguments.jobs]
    if arguments.tune:
        return list(TUNING)
    return [name for name, work in JOBS.items() if work.quick or not arguments.quick]


def refusal() -> str | None:
    """Return why nothing can run here, or None."""
    if not torch.cuda.is_available():
        return NO_GPU
    triton = topd.backends()["triton"]
    if triton.interpreted:
        return "TRITON_INTERPRET is set, so the kernels would run in Triton's interpreter; unset it and run again"
    return None if triton else f"the triton backend is not available: {triton.detail}"


def run_job(arguments: argparse.Namespace) -> int:
    """Measure one job, in this process: its lines go to stdout as JSON, whatever else prints there to stderr."""
    run = run_of(arguments, torch.device("cuda", torch.cuda.current_device()))
    try:
        speak(JOBS[arguments.job].lines(run))
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = parser().parse_args(given)
    if arguments.job is not None:
        return run_job(arguments)
    if (why := refusal()) is not None:
        note(why)
        return NO_DEVICE
    report = Report(arguments.json)
    runner = Runner(seconds_of(arguments), report.add)
    report.write({"benchmark": "gpu", "arguments": given})
    command = [sys.executable, "-m", "topd_bench.gpu", *given]
    runner.run([Job(name, [*command, "--job", name], JOBS[name].seconds) for name in names_of(arguments)])
    how = "complete" if runner.signal is None else f"broken off: {signal.Signals(runner.signal).name}"
    print(f"\n{how}, {runner.seconds:.0f} s, wrong or failed: {runner.failed}", flush=True)
    report.write({"how": how, "seconds": round(runner.seconds, 1), "failed": runner.failed})
    return int(runner.failed > 0) if runner.signal is None else 128 + runner.signal
