"""`topd profile`: what a loss, or a step of a method, will cost: predicted from configurations alone, and measured by --run."""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from topd.cli import profile_run
from topd.cli.errors import CommandError
from topd.cli.options import nonempty, positive
from topd.cli.profile_text import text
from topd.costs import memory
from topd.costs.call import LossCall
from topd.costs.devices import DEVICES, Device
from topd.costs.predicted import SWEEPS
from topd.costs.shapes import ModelShape, model_shape
from topd.costs.sharded import rank_share
from topd.costs.steps import METHODS, Step, step_report
from topd.files import write_json
from topd.objectives.vocabularies import check_vocabularies

HELP = "predict memory, operations and time of a loss or a step from configs alone; --run measures the loss here"
DESCRIPTION = """\
Predicts what a divergence and its gradients cost: the chunks that topd takes,
the peak memory of eager torch, TRL's chunked loss and topd beyond weights and
hidden states, the operations of the matrix products, and on a named GPU the
time. No weight is loaded and no GPU is needed; nothing is measured.

  topd profile --student Qwen/Qwen3-8B --teacher Qwen/Qwen3-14B --device h100
  topd profile --hidden 4096 --teacher-hidden 5120 --vocab 151936

--method adds a table of a whole training step: both models' passes, the loss,
TOPD's windows, the optimizer. --tp N adds what each of N ranks would hold and
exchange if the heads were sharded over the vocabulary: a prediction of the
loss alone. --run measures the loss on the device at hand, on random hidden
states and heads of the same shape, and sets it beside the prediction.

  topd profile --student ./student --teacher ./teacher --method topd
  topd profile --run --hidden 576 --vocab 49152 --tokens 1024 --dtype fp32

A model is a folder with a config.json, or a name on a hub that transformers
can load the configuration of."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHORT = {device.name.split()[0].lower(): device for device in DEVICES}


def add_to(commands: Any) -> None:
    """Add the subcommand to those of argparse."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser("profile", help=HELP, description=DESCRIPTION, formatter_class=raw)
    add = parser.add_argument
    add("--student", type=nonempty, metavar="MODEL", help="a folder with config.json, or a name on a hub")
    add("--teacher", type=nonempty, metavar="MODEL", help="the same of the teacher")
    add("--hidden", type=positive, metavar="N", help="the student's hidden width, in place of models")
    add("--teacher-hidden", type=positive, metavar="N", help="the teacher's (default: the student's)")
    add("--vocab", type=positive, metavar="N", help="entries of both vocabularies, in place of models")
    add("--tokens", type=positive, metavar="N", default=8192, help="tokens of a micro-batch (default 8192); prompts count in "
        "the passes, and cost the loss nothing")  # fmt: skip
    add("--dtype", choices=DTYPES, default="bf16", help="of weights and hidden states (default bf16)")
    add("--loss", choices=SWEEPS, help="default reverse_kl; with --method trd forward_kl")
    add("--frozen-head", action="store_true", help="the student's head is not trained")
    add("--device", choices=(*SHORT, "cpu"), help="of the prediction (default h100; with --run the device at hand)")
    add("--method", choices=METHODS, help="predict a whole step of this method")
    add("--length", type=positive, metavar="N", help="tokens of a trajectory, for --method topd (default 1024)")
    add("--teacher-tokens", type=positive, metavar="N", help="that the teacher reads (default: --tokens; trd: twice as many)")
    add("--checkpointing", action="store_true", help="the student's activations are computed again in the backward pass")
    add("--tp", type=positive, metavar="N", help="heads sharded over the vocabulary among N ranks: predicts the loss's memory, "
        "products and exchange on one rank")  # fmt: skip
    add("--run", action="store_true", dest="measure", help="also measure the loss here: topd, eager, and TRL if installed")
    add("--trace", type=Path, metavar="FILE", help="with --run: torch.profiler's trace of topd, in Chrome's format")
    add("--json", type=Path, metavar="FILE", help="also write everything there")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the prediction, and what was measured where that is asked for."""
    check(arguments)
    device = profile_run.device_here() if arguments.measure else None
    call = call_of(arguments, device)
    report = report_of(arguments, call)
    print(text(report), flush=True)
    if device is not None:
        report["measured"] = profile_run.measured(call, arguments.loss, device, arguments.trace)
        print("\n" + profile_run.text(report), flush=True)
    if arguments.json:
        write_json(arguments.json, report)
    return 0


def check(arguments: argparse.Namespace) -> None:
    """Refuse options that do not go together, and fill in what follows from others."""
    if arguments.trace and not arguments.measure:
        raise CommandError("--trace must stand beside --run, which it records: add --run, or leave --trace out")
    if arguments.tp and arguments.measure:
        raise CommandError("--tp must not stand beside --run: it predicts several ranks, and --run measures one process")
    for name in ("length", "teacher_tokens", "checkpointing"):
        if getattr(arguments, name) and not arguments.method:
            raise CommandError(f"--{name.replace('_', '-')} must stand beside --method, whose step it describes")
    if arguments.length and arguments.method != "topd":
        raise CommandError(f"--length must stand beside --method topd, whose windows read so much, got {arguments.method}")
    for path in (arguments.trace, arguments.json):
        if path and not path.parent.is_dir():
            raise CommandError(f"{path.parent} must be a folder, to write {path.name} into, and is none: make it first")
    arguments.loss = arguments.loss or ("forward_kl" if arguments.method == "trd" else "reverse_kl")


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
            return model_shape(arguments.student, _say), model_shape(arguments.teacher, _say)
        except ValueError as error:
            raise CommandError(str(error)) from error
    if arguments.hidden is None or arguments.vocab is None:
        raise CommandError("--student and --teacher, or --hidden and --vocab, must be given")
    teacher = arguments.teacher_hidden or arguments.hidden
    return ModelShape("student", arguments.hidden, arguments.vocab), ModelShape("teacher", teacher, arguments.vocab)


def call_of(arguments: argparse.Namespace, here: torch.device | None) -> LossCall:
    """Return the call that is asked for; `here`: the device of --run."""
    student, teacher = sides(arguments)
    named: Device | None
    if arguments.device:
        named = SHORT.get(arguments.device)
    elif here is None:
        named = SHORT["h100"]
    else:
        named = None if here.type == "cpu" else known_gpu(here)
    try:
        check_vocabularies(student.vocab, teacher.vocab, allow_unequal=False)
    except ValueError as error:
        _say(f"topd.OPD refuses this pair: {error}")
    dtype, trained = DTYPES[arguments.dtype], not arguments.frozen_head
    return LossCall(student, teacher, arguments.tokens, dtype, arguments.loss, trained, named)


def known_gpu(here: torch.device) -> Device:
    """Return what is known of the GPU at hand."""
    name = torch.cuda.get_device_name(here)
    known = next((device for short, device in SHORT.items() if short in name.lower()), None)
    if known is None:
        raise CommandError(f"--device must say for which GPU to predict, since {name} is not known: one of {', '.join(SHORT)}")
    return known


def report_of(arguments: argparse.Namespace, call: LossCall) -> dict[str, Any]:
    """Return everything that is predicted, by name."""
    chunks = call.plan()
    peaks = call.peaks(chunks)
    case: dict[str, Any] = {name: getattr(call, name) for name in ("n", "vocab", "student_width", "teacher_width")}
    case |= {"loss": call.loss, "dtype": arguments.dtype, "frozen_head": arguments.frozen_head}
    report = {
        "prediction": True,
        "student": call.student._asdict(),
        "teacher": call.teacher._asdict(),
        "case": case,
        "plan": {name: getattr(chunks, name) for name in ("rows", "chunks", "pile", "workspace_bytes", "peak_bytes", "flop")},
        "backend": chunks.backend,
        "memory_bytes": peaks,
        "never_allocated_bytes": memory.total(peaks["eager"]) - memory.total(peaks["topd"]),
        "device": call.device.name if call.device else "cpu",
        "time": call.time(chunks),
        "fits": fits(call, peaks),
    }
    if arguments.method:
        length = arguments.length or 1024
        step = Step(arguments.method, call, length, arguments.teacher_tokens, arguments.checkpointing)
        report["step"] = step_report(step, chunks)
    if arguments.tp:
        report["tp"] = rank_share(call, arguments.tp)
    return report


def fits(call: LossCall, peaks: dict[str, dict[str, int]]) -> dict[str, Any] | None:
    """Return for each way whether its peak fits beside the weights, as far as they are known; None on a CPU."""
    if call.device is None:
        return None
    both = (call.student, call.teacher)
    weights = sum(call.dtype.itemsize * (side.parameters or side.hidden * side.vocab) for side in both)
    free = call.device.memory_bytes - weights
    return {
        "weights_bytes": weights,
        "weights": "all" if all(side.parameters for side in both) else "where a model is not known its head alone",
        "memory_bytes": call.device.memory_bytes,
        "fits": {name: memory.total(parts) <= free for name, parts in peaks.items()},
    }


def _say(line: str) -> None:
    print(f"topd profile: {line}", file=sys.stderr, flush=True)
