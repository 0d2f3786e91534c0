"""The block of `topd.profile`: it watches an objective, and keeps the time and the memory of each stage."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from topd.files import write_json
from topd.models.properties import vocabulary_of
from topd.objectives.method import Method
from topd.objectives.objective import Objective
from topd.objectives.observers import Observer
from topd.objectives.opd import OPD
from topd.objectives.topd import TOPD
from topd.profiling.devices import device_words
from topd.profiling.peaks import Peak, peak_of
from topd.profiling.plot import save_plot
from topd.profiling.recorder import Recorder
from topd.profiling.report import BETWEEN, REST, Report, StageTime
from topd.profiling.timeline import Timeline, clock_of

# What the backward pass goes on with when it comes to the gradient of a tensor of the student.
NEXT_IN_BACKWARD = {
    "window_hidden": "backward_windows",
    "token_losses": "backward_divergence",
    "student_hidden": "backward_student",
}


class Profile(Observer):
    """What the steps inside a `topd.profile` block spent: `print` it, or take one of the methods below, after the block.

    Attributes:
        report: all numbers as a record; None until the block has ended.
    """

    def __init__(self, objective: OPD | TOPD, trace: Path | None) -> None:
        self.report: Report | None = None
        self._objective, self._trace = objective, trace
        self._open, self._used = False, False
        self._calls = self._backwards = 0
        self._tokens: list[Tensor] = []
        self._stages = self._around = [REST]  # from the outermost to the one that runs; what a call or a backward stands in

    def __enter__(self) -> "Profile":
        if self._used:
            raise ValueError("a profile must not be entered twice; make a new one with topd.profile(objective)")
        with ExitStack() as stack:
            stack.enter_context(self._objective.observed(self))
            device = _device_of(self._objective)
            self._recorder = Recorder(device) if self._trace is not None else None
            if self._recorder is not None:
                stack.enter_context(self._recorder.recording())
            self._begin(device)
            self._blocks = stack.pop_all()
        self._open = self._used = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._open = False
        try:
            self._peak.stage_ends(self._stages[-1])
            self._timeline.close()
            seconds = time.perf_counter() - self._start
        finally:
            self._blocks.close()
        if self._recorder is not None and self._trace is not None:
            self._recorder.write(self._trace)
        self.report = self._reported(seconds)

    def __str__(self) -> str:
        if self.report is None:
            return f"profile of {type(self._objective).__name__}: no report before its block has ended"
        return str(self.report)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Give a part of your loop a stage of its own, which would else count as the rest of it::

            with profile.stage("rollouts"):
                batch = sample(student, prompts)

        Args:
            name: of the stage, as the report calls it; in no other stage of the step.

        Raises:
            TypeError, ValueError: an empty name, or none; outside the block.
        """
        if not isinstance(name, str):
            raise TypeError(f"name must be a string, got {type(name).__name__}")
        if not name.strip():
            raise ValueError("name must have a character that shows, got none")
        if not self._open:
            raise ValueError(f"stage {name!r} must stand inside the topd.profile block, and that is not open")
        self.stage_begins(name)
        try:
            yield
        finally:
            self.stage_ends(name)

    def to_json(self, path: str | Path) -> None:
        """Write all numbers to a file.

        Raises:
            ValueError: the block has not ended.
        """
        write_json(Path(path), self._ended("to_json").as_dict())

    def plot(self, path: str | Path) -> None:
        """Draw a call's time by stage as a bar, and save it; the suffix of the path says in which format.

        Raises:
            ValueError: the block has not ended, or the objective was never called in it.
            ImportError: matplotlib is not installed.
        """
        save_plot(self._ended("plot"), Path(path))

    # What the objective tells.

    def call_begins(self) -> None:
        """Begin a call; where the student has come to another device meanwhile, begin the whole measurement there."""
        device = _device_of(self._objective)
        if device != self._device and not self._calls:
            self._begin(device)
        self._timeline.settle()
        self._around = self._stages
        self._enter([*self._around, BETWEEN])

    def call_ends(self, objective: Objective | None) -> None:
        """Go back to the loop, and wait for the backward pass of the loss."""
        if objective is not None:
            self._calls += 1
            self._tokens.append(objective.metrics["tokens"])
            if objective.loss.requires_grad:
                first = "backward_guidance" if "guidance" in self._seen else "backward_divergence"
                objective.loss.register_hook(lambda _: self._backward_begins(first))
        self._seen.clear()
        self._enter(self._around)

    def stage_begins(self, name: str) -> None:
        """Begin a stage."""
        self._seen.add(name)
        self._timeline.entered[name] += 1
        self._enter([*self._stages, name])

    def stage_ends(self, name: str) -> None:
        """Go back to what it stands in."""
        if self._stages[-1] == name:
            self._enter(self._stages[:-1])

    def tensor(self, name: str, tensor: Tensor) -> None:
        """Wait for a gradient, which parts the backward pass."""
        if tensor.requires_grad:
            tensor.register_hook(lambda _: self._backward_comes_to(NEXT_IN_BACKWARD[name]))

    # The backward pass.

    def _backward_begins(self, stage: str) -> None:
        if self._open:
            self._backwards += 1
            self._around = self._stages
            self._backward_comes_to(stage)
            torch.autograd.Variable._execution_engine.queue_callback(self._backward_ends)

    def _backward_comes_to(self, stage: str) -> None:
        if self._open and self._stages[-1] != stage:
            self._timeline.entered[stage] += 1
            self._enter([*self._around, stage])

    def _backward_ends(self) -> None:
        if self._open:
            self._enter(self._around)

    # The measurement.

    def _begin(self, device: torch.device) -> None:
        """Begin to measure on a device."""
        self._device, self._seen = device, set[str]()
        self._peak: Peak = peak_of(device)
        self._timeline = Timeline(clock_of(device))
        self._start = time.perf_counter()
        self._timeline.switch(self._stages[-1])

    def _enter(self, stages: list[str]) -> None:
        """Let the last of these stages run, the others around it."""
        if self._open:
            self._peak.stage_ends(self._stages[-1])
            self._timeline.switch(stages[-1])
        self._stages = stages

    def _ended(self, wanted: str) -> Report:
        if self.report is None:
            raise ValueError(f"{wanted} must come after the topd.profile block, and it has not ended")
        return self.report

    def _reported(self, seconds: float) -> Report:
        """Return the numbers of the block."""
        peaks, timeline = self._peak.by_stage(), self._timeline
        entered = dict(timeline.entered) | {BETWEEN: self._calls, REST: self._calls}
        order = [name for name in timeline.seconds if name != REST] + [REST]
        tokens = [int(count) for count in self._tokens]
        sides = [self._objective.student] + ([] if self._objective.teacher is None else [self._objective.teacher])
        entry = 4 * sum(map(vocabulary_of, sides))
        waits, note = self._waits()
        return Report(
            objective=type(self._objective).__name__,
            device=device_words(self._device),
            calls=self._calls,
            backwards=self._backwards,
            tokens=sum(tokens),
            seconds=seconds,
            stages=tuple(StageTime(name, timeline.seconds[name], entered[name], peaks.get(name)) for name in order),
            peak_mib=self._peak.mib(),
            peak_source=self._peak.source,
            host_waits=waits,
            host_waits_note=note,
            logits_bytes=entry * sum(tokens),
            largest_logits_bytes=entry * max(tokens, default=0),
            trace=None if self._trace is None else str(self._trace),
        )

    def _waits(self) -> tuple[dict[str, float] | None, str]:
        if self._device.type != "cuda":
            at_cpu = self._device.type == "cpu"
            return None, "none: on a CPU the host itself computes" if at_cpu else "not counted: CUDA's and ROCm's alone are"
        if self._recorder is None:
            return None, "not counted: pass trace=FILE, and torch.profiler records them"
        return self._recorder.host_waits(), "of the whole block, with the one by which the profiler ends"


def _device_of(objective: Method) -> torch.device:
    """Return where the student is."""
    parameter = next(objective.student.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
