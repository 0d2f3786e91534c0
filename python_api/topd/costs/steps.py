"""What a step of a method costs beside the divergence: both models' passes, TOPD's windows, the optimizer. From configs alone.

A pass over tokens multiplies each number in the layers' matrices once a token: 2 flop a number forward, 4 backward (6 where
activations are checkpointed, whose forward runs again). Attention's own products, which grow with the length, norms and
embeddings are left out. A window's token is one forward of both layers and head for all branches together, which reads every
weight: with few branches that reading takes the time, not the products.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from topd.costs import memory
from topd.costs.call import LossCall
from topd.costs.products import NARROW
from topd.costs.shapes import ModelShape
from topd.losses.plan import Plan

METHODS = ("opd", "topd", "trd")
# TOPD's defaults: candidates among the tokens; tokens of a window; false alarms among the candidates.
CANDIDATES, HORIZON, FALSE_ALARMS = 0.0225, 50, 0.3
HELD = ("student's gradients", "AdamW", "divergence")
MOMENTS = 2  # AdamW's, in float32
PRODUCTS, WEIGHTS, CACHES, BYTES = "products", "reading weights", "reading caches", "bytes"


@dataclass(frozen=True)
class Step:
    """A step of a method.

    Attributes:
        method: opd, topd or trd.
        call: its divergence.
        length: tokens of a trajectory with its prompt, on average.
        teacher_tokens: that the teacher reads; None: as many as the student, for trd twice as many, since its prompt holds the
            student's attempt.
        checkpointing: activations are computed again in the backward pass.
    """

    method: str
    call: LossCall
    length: int
    teacher_tokens: int | None
    checkpointing: bool

    @property
    def teacher_reads(self) -> int:
        return self.teacher_tokens or self.call.n * (2 if self.method == "trd" else 1)

    @property
    def candidates(self) -> int:
        """Return how many windows each model continues from."""
        return max(1, round(CANDIDATES * self.call.n))

    @property
    def window_tokens(self) -> int:
        """Return the student's tokens in the windows of divergent points."""
        return (self.candidates - int(FALSE_ALARMS * self.candidates)) * HORIZON


class StageCost(NamedTuple):
    """A stage: flop, seconds (None: not predicted), by what it is bound, and bytes that it leaves or holds beside the weights;
    None: not known, and `note` says why."""

    name: str
    flop: float | None
    seconds: float | None
    bound: str
    memory_bytes: int | None
    note: str = ""


def stages_of(step: Step, chunks: Plan) -> list[StageCost]:
    """Return the stages of a step in their order."""
    call = step.call
    student, teacher = call.student, call.teacher
    loss = call.time(chunks)
    seconds = None if loss is None else loss["total_ms"] / 1e3
    peak = memory.total(memory.topd_memory(chunks, call.sizes))
    divergence = StageCost("divergence, with its backward", chunks.flop, seconds, loss["bound"] if loss else "", peak)
    windows = _windows(step) if step.method == "topd" else []
    again = " (activations again)" if step.checkpointing else ""
    backward = _pass(step, student, f"student's backward{again}", call.n, 6 if step.checkpointing else 4)
    return [
        _forward(step, teacher, "teacher's forward", step.teacher_reads, _cache(step, teacher)),
        _forward(step, student, "student's forward", call.n, _activations(step)),
        divergence,
        *windows,
        backward._replace(memory_bytes=_numbers(student.parameters, call.dtype.itemsize)),
        _optimizer(step),
    ]


def _pass(step: Step, model: ModelShape, name: str, tokens: int, per_number: int) -> StageCost:
    """Return a pass of so many flop a number and token, without memory."""
    if model.body is None:
        return StageCost(name, None, None, "", None, _why(model))
    flop = float(per_number * model.body * tokens)
    rates = _rates(step)
    if rates is None:
        return StageCost(name, flop, None, "", None)
    multiplying, reading = flop / rates[0], step.call.dtype.itemsize * model.body / rates[1]
    return StageCost(name, flop, max(multiplying, reading), PRODUCTS if multiplying >= reading else WEIGHTS, None)


def _forward(step: Step, model: ModelShape, name: str, tokens: int, held: int | None) -> StageCost:
    return _pass(step, model, name, tokens, 2)._replace(memory_bytes=held)


def _windows(step: Step) -> list[StageCost]:
    """Return TOPD's further stages: both models' windows, and the guidance of the student's."""
    call = step.call
    student, tokens, width = call.student, step.window_tokens, call.student.hidden
    products = 3 if call.trained else 2
    flop = 2.0 * products * tokens * width * student.vocab
    rates = _rates(step)
    held = memory.FLOAT32 * (width * student.vocab * call.trained + tokens * width)
    again = 6 if step.checkpointing else 4
    return [
        _generation(step, student, "student's windows"),
        _generation(step, call.teacher, "teacher's windows"),
        _pass(step, student, "student's forward over windows", tokens, 2),
        StageCost("guidance, with its backward", flop, rates and flop / rates[0], PRODUCTS if rates else "", held),
        _pass(step, student, "student's backward over windows", tokens, again),
    ]


def _generation(step: Step, model: ModelShape, name: str) -> StageCost:
    """Return the windows of one model: a forward of all branches for each of their tokens."""
    if model.body is None or model.cached is None:
        return StageCost(name, None, None, "", None, _why(model))
    itemsize, branches = step.call.dtype.itemsize, step.candidates
    numbers = model.body + model.hidden * model.vocab
    flop = 2.0 * numbers * branches * HORIZON
    held = itemsize * branches * HORIZON * model.cached
    rates = _rates(step)
    if rates is None:
        return StageCost(name, flop, None, "", held)
    weights = HORIZON * itemsize * numbers
    caches = HORIZON * itemsize * branches * (step.length + HORIZON) // 2 * model.cached
    multiplying, reading = flop / rates[0], (weights + caches) / rates[1]
    what = WEIGHTS if weights >= caches else CACHES
    return StageCost(name, flop, max(multiplying, reading), PRODUCTS if multiplying >= reading else what, held)


def _optimizer(step: Step) -> StageCost:
    """Return AdamW's step: weights, gradients and two float32 moments read, all but the gradients written."""
    model, itemsize = step.call.student, step.call.dtype.itemsize
    if model.parameters is None:
        return StageCost("AdamW", None, None, "", None, _why(model))
    moments = MOMENTS * memory.FLOAT32
    rates = _rates(step)
    seconds = None if rates is None else model.parameters * (3 * itemsize + 2 * moments) / rates[1]
    return StageCost("AdamW", 0.0, seconds, BYTES if rates else "", moments * model.parameters)


def _cache(step: Step, model: ModelShape) -> int | None:
    """Return the bytes of hidden states, and for TOPD of the cache that its windows grow from."""
    kept = model.cached if step.method == "topd" else 0
    return None if kept is None else step.call.dtype.itemsize * step.teacher_reads * (model.hidden + kept)


def _activations(step: Step) -> int | None:
    """Return the bytes of the layers' inputs, which is what checkpointing keeps; without it no config tells."""
    call, layers = step.call, step.call.student.layers
    return None if layers is None or not step.checkpointing else layers * call.n * call.student.hidden * call.dtype.itemsize


def _numbers(count: int | None, size: int) -> int | None:
    return None if count is None else count * size


def _rates(step: Step) -> tuple[float, float] | None:
    """Return flop and bytes a second; None where the model of time does not know the device or the dtype."""
    device = step.call.device
    return None if device is None or step.call.dtype.itemsize != NARROW else (device.product_flop, device.bandwidth)


def _why(model: ModelShape) -> str:
    return f"{model.name}: {model.unknown}" if model.unknown else f"{model.name}: known by its width and vocabulary alone"


def step_report(step: Step, chunks: Plan) -> dict[str, Any]:
    """Return the stages, their sum where every one is known, and what the table leaves out."""
    stages = stages_of(step, chunks)
    seconds = [stage.seconds for stage in stages]
    parts = {name: stage.memory_bytes for name, stage in zip(HELD, (stages[-2], stages[-1], stages[2]), strict=True)}
    weights = [_numbers(side.parameters, step.call.dtype.itemsize) for side in (step.call.student, step.call.teacher)]
    held = {"weights": None if None in weights else sum(map(int, filter(None, weights))), **parts}
    known = [each for each in seconds if each is not None]
    total = sum(known) if len(known) == len(seconds) else None
    loss = sum(stage.seconds or 0.0 for stage in stages if stage.name.startswith(("divergence", "guidance")))
    return {
        "method": step.method,
        "length": step.length,
        "teacher_tokens": step.teacher_reads,
        "candidates": step.candidates if step.method == "topd" else 0,
        "horizon": HORIZON if step.method == "topd" else 0,
        "checkpointing": step.checkpointing,
        "stages": [stage._asdict() for stage in stages],
        "held_bytes": None if None in held.values() else held,
        "seconds": total,
        "loss_share": loss / total if total else None,
    }
