"""`topd profile`: what a loss will cost, predicted from configurations alone."""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch

from topd.cli.errors import CommandError
from topd.cli.options import nonempty, positive
from topd.costs import memory
from topd.costs.devices import DEVICES, Device
from topd.costs.predicted import SWEEPS, bound, predicted_time
from topd.costs.products import NARROW, default_plan, products_of
from topd.costs.shapes import ModelShape, model_shape
from topd.files import write_json
from topd.head import Head
from topd.losses.plan import TFLOP, Plan, plan
from topd.memory import size_text
from topd.ops.shared.engines import engine_of
from topd.ops.shared.plan import default_workspace, wanted_workspace

HELP = "predict memory, operations and time of a loss, from configs alone"
DESCRIPTION = """\
Predicts what a divergence and its gradients cost: the chunks that topd takes,
the peak memory of eager torch, TRL's chunked loss and topd beyond weights and
hidden states, the operations of the matrix products, and on a named GPU the
time. No weight is loaded and no GPU is needed; nothing is measured.

  topd profile --student Qwen/Qwen3-8B --teacher Qwen/Qwen3-14B --device h100
  topd profile --hidden 4096 --teacher-hidden 5120 --vocab 151936

A model is a folder with a config.json, or a name on a hub that transformers
can load the configuration of."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHORT = {device.name.split()[0].lower(): device for device in DEVICES}


class Case(NamedTuple):
    """The shape of a call, as the model of the products' time wants it."""

    n: int
    vocab: int
    student_width: int
    teacher_width: int


def add_to(commands: Any) -> None:
    """Add the subcommand to those of argparse."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser("profile", help=HELP, description=DESCRIPTION, formatter_class=raw)
    parser.add_argument("--student", type=nonempty, metavar="MODEL", help="a folder with config.json, or a name on a hub")
    parser.add_argument("--teacher", type=nonempty, metavar="MODEL", help="the same of the teacher")
    parser.add_argument("--hidden", type=positive, metavar="N", help="the student's hidden width, in place of models")
    parser.add_argument("--teacher-hidden", type=positive, metavar="N", help="the teacher's (default: the student's)")
    parser.add_argument("--vocab", type=positive, metavar="N", help="entries of both vocabularies, in place of models")
    parser.add_argument("--tokens", type=positive, metavar="N", default=8192, help="tokens of a step (default 8192)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of weights and hidden states (default bf16)")
    parser.add_argument("--loss", choices=SWEEPS, default="reverse_kl", help="default reverse_kl")
    parser.add_argument("--frozen-head", action="store_true", help="the student's head is not trained")
    parser.add_argument("--device", choices=(*SHORT, "cpu"), default="h100", help="default h100")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything there")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the prediction."""
    report = report_of(arguments)
    print(text(report))
    if arguments.json:
        write_json(arguments.json, report)
    return 0


def sides(arguments: argparse.Namespace) -> tuple[ModelShape, ModelShape]:
    """Return the student's and the teacher's shape.

    Raises:
        CommandError: options contradict each other or are missing, or a config cannot be read.
    """
    models = (arguments.student, arguments.teacher)
    numbers = {"--hidden": arguments.hidden, "--teacher-hidden": arguments.teacher_hidden, "--vocab": arguments.vocab}
    given = [name for name, value in numbers.items() if value is not None]
    if any(models) and given:
        raise CommandError(f"{', '.join(given)} must not stand beside --student or --teacher: pass models or numbers")
    if any(models):
        if not all(models):
            missing = "--teacher" if arguments.student else "--student"
            raise CommandError(f"{missing} must be given too: a folder with config.json, or a name on a hub")
        try:
            return model_shape(arguments.student), model_shape(arguments.teacher)
        except ValueError as error:
            raise CommandError(str(error)) from error
    if arguments.hidden is None or arguments.vocab is None:
        raise CommandError("--student and --teacher, or --hidden and --vocab, must be given")
    teacher = arguments.teacher_hidden or arguments.hidden
    return ModelShape("student", arguments.hidden, arguments.vocab), ModelShape("teacher", teacher, arguments.vocab)


def report_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return everything that is printed, by name."""
    student, teacher = sides(arguments)
    dtype, trained = DTYPES[arguments.dtype], not arguments.frozen_head
    vocab, device = min(student.vocab, teacher.vocab), SHORT.get(arguments.device)
    case = Case(arguments.tokens, vocab, student.hidden, teacher.hidden)
    chunks = planned(student, teacher, case, dtype, device, trained=trained)
    sizes = memory.Sizes(case.n, vocab, student.hidden, dtype.itemsize, trained)
    peaks = {
        "eager": memory.eager_memory(sizes, arguments.loss),
        "TRL": memory.trl_memory(sizes, arguments.loss, kernels=device is not None),
        "topd": memory.topd_memory(chunks, sizes),
    }
    return {
        "prediction": True,
        "student": student._asdict(),
        "teacher": teacher._asdict(),
        "case": case._asdict() | {"loss": arguments.loss, "dtype": arguments.dtype, "frozen_head": arguments.frozen_head},
        "plan": {name: getattr(chunks, name) for name in ("rows", "chunks", "pile", "workspace_bytes", "peak_bytes", "flop")},
        "backend": chunks.backend,
        "memory_bytes": peaks,
        "never_allocated_bytes": memory.total(peaks["eager"]) - memory.total(peaks["topd"]),
        "device": device.name if device else "cpu",
        "time": time_of(case, device, arguments.loss, dtype, trained=trained),
        "fits": fits(student, teacher, dtype, device, peaks),
    }


def planned(
    student: ModelShape, teacher: ModelShape, case: Case, dtype: torch.dtype, device: Device | None, *, trained: bool
) -> Plan:
    """Return topd's plan at the default workspace of the device."""
    heads = [
        Head(torch.empty(side.vocab, side.hidden, dtype=dtype, device="meta", requires_grad=own))
        for side, own in ((student, trained), (teacher, False))
    ]
    workspace = None
    if device is not None:
        width = engine_of("triton").row_width(case.vocab)
        products = products_of(case, trained) if dtype.itemsize == NARROW else None
        wanted = wanted_workspace(case.n, width, width, products=products)
        workspace = default_workspace("cuda", device.available_bytes, wanted=wanted)
    return plan(heads[0], heads[1], case.n, device="cuda" if device else "cpu", workspace_bytes=workspace)


def time_of(case: Case, device: Device | None, loss: str, dtype: torch.dtype, *, trained: bool) -> dict[str, Any] | None:
    """Return the predicted milliseconds; None where the model does not know the device or the dtype."""
    if device is None or dtype.itemsize != NARROW:
        return None
    plan = default_plan(case, device, weight_grad=trained)
    seconds = predicted_time(case, device, loss, plan, weight_grad=trained)
    parts = {f"{name}_ms": part * 1e3 for name, part in seconds._asdict().items()}
    return parts | {"total_ms": seconds.total * 1e3, "bound": bound(seconds)}


def fits(
    student: ModelShape, teacher: ModelShape, dtype: torch.dtype, device: Device | None, peaks: dict[str, dict[str, int]]
) -> dict[str, Any] | None:
    """Return for each way whether its peak fits beside the weights, as far as they are known; None on a CPU."""
    if device is None:
        return None
    known = student.parameters is not None and teacher.parameters is not None
    weights = sum(dtype.itemsize * (side.parameters or side.hidden * side.vocab) for side in (student, teacher))
    free = device.memory_bytes - weights
    return {
        "weights_bytes": weights,
        "weights": "all" if known else "where a model is not known its head alone",
        "memory_bytes": device.memory_bytes,
        "fits": {name: memory.total(parts) <= free for name, parts in peaks.items()},
    }


def text(report: dict[str, Any]) -> str:
    """Return the report for a reader."""
    case, chunks = report["case"], report["plan"]
    head = "trained" if not case["frozen_head"] else "frozen"
    lines = [
        f"PREDICTION, nothing was measured: {case['loss']} of {case['n']:,} tokens, vocabulary {case['vocab']:,}, hidden "
        f"{case['student_width']:,} (teacher {case['teacher_width']:,}), {case['dtype']}, {head} head, {report['device']}",
        "",
        f"chunks      {chunks['chunks']:,} of up to {chunks['rows']:,} rows, gradients of {chunks['pile']} to a product, "
        f"workspace {size_text(chunks['workspace_bytes'])}, backend {report['backend']}",
        f"products    {chunks['flop'] / TFLOP:,.3g} Tflop",
        _time_line(report["time"]),
        "",
        "peak memory beyond weights and hidden states",
    ]
    for name, parts in report["memory_bytes"].items():
        spelled = ", ".join(f"{part} {size_text(size)}" for part, size in parts.items() if size)
        lines.append(f"  {name:<6}{size_text(memory.total(parts)):>12}  = {spelled}")
    lines += [f"  never allocated (eager - topd): {size_text(report['never_allocated_bytes'])}", "", _fits_line(report)]
    return "\n".join(lines)


def _time_line(time: dict[str, Any] | None) -> str:
    if time is None:
        return "time        not predicted: the model knows GPUs and 16-bit operands alone"
    parts = ", ".join(f"{name} {time[f'{name}_ms']:.1f}" for name in ("products", "bytes", "issue"))
    return f"time        {time['total_ms']:.1f} ms with topd ({parts}); bound by {time['bound']}"


def _fits_line(report: dict[str, Any]) -> str:
    fit = report["fits"]
    if fit is None:
        return "fits        not said of a CPU: its memory is not one device's"
    answers = ", ".join(f"{name} {'yes' if yes else 'NO'}" for name, yes in fit["fits"].items())
    return (
        f"fits        {answers}; beside {size_text(fit['weights_bytes'])} of weights ({fit['weights']}) in "
        f"{size_text(fit['memory_bytes'])}, without optimizer and activations"
    )
