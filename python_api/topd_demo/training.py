"""One method's run: a batch, the objective, an optimizer step; evaluations, checkpoints, and going on from one.

Nothing random is carried from step to step: rollouts and windows of step n are drawn from (seed, n), so that a run that goes on
from a checkpoint gets the very numbers that it would have got.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

import topd
from topd import files
from topd.cli.errors import CommandError
from topd.memory import used_mib
from topd_demo.evaluation import Evaluation, Transcript
from topd_demo.paired import PairedEvaluation, Row
from topd_demo.settings import Settings
from topd_demo.window_pair import WindowPair
from topd_demo.wording import Wording

Record = dict[str, Any]
STEP_SEED = 100_003  # rollouts of step n are drawn from seed * STEP_SEED + n


@dataclass
class Run:
    """What a method has done so far.

    Attributes:
        records: a mapping a step, and one for each evaluation, as they stand in metrics.jsonl.
        before, after: the first and the latest evaluation, of the method's evaluation_type.
        pair: of TOPD, the two windows of the latest step that are furthest apart.
    """

    method: str
    done: int = 0
    records: list[Record] = field(default_factory=list)
    before: Any = None
    after: Any = None
    pair: WindowPair | None = None


CHECKPOINT_TYPES: list[Any] = [Run, Evaluation, Transcript, Wording, PairedEvaluation, Row, WindowPair]


def schedule(index: int, steps: int, warmup: int) -> float:
    """Return the factor of the learning rate at a step: a linear warm-up, then a linear fall to a tenth."""
    if index < warmup:
        return (index + 1) / warmup
    return 1.0 - 0.9 * (index - warmup) / max(steps - 1 - warmup, 1)


class Method(Protocol):
    """What is trained, by which loss, on what, and how it is judged.

    Attributes:
        name: one of DEMO_METHODS or PAIRED_METHODS.
        student: the model that is trained.
        objective: its loss.
        evaluation_type: of what `evaluate` returns.
    """

    name: str
    student: Any
    objective: topd.OPD | topd.TOPD
    evaluation_type: type

    def batch(self, index: int) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return a step's batch, drawn from torch's generator, and numbers about it for the step's record."""

    def evaluate(self, first: bool) -> Any:
        """Judge the student as it is now; `first`: before its first step."""

    def window_pair(self, objective: topd.Objective, batch: dict[str, Tensor]) -> WindowPair | None:
        """Return a pair of windows of the step to show; None where there is none."""


class Trainer:
    """Trains a method's student.

    Args:
        before: the evaluation of the student as it is, where it is known.
        folder: where the checkpoint stands.
    """

    def __init__(self, method: Method, settings: Settings, folder: Path, before: Any = None) -> None:
        self.method, self.settings = method, settings
        self.path = folder / f"checkpoint-{method.name}.pt"
        self.run, self.known = Run(method.name), before
        options: dict[str, Any] = {"lr": settings.learning_rate, "betas": (0.9, 0.95), "weight_decay": 0.0, "fused": True}
        self.trained: list[Tensor] = [each for each in method.student.parameters() if each.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, **options)

    def resume(self) -> bool:
        """Go on from the checkpoint; return False where there is none.

        Raises:
            CommandError: it is damaged, or another run's.
        """
        if not self.path.exists():
            return False
        try:
            self._load()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # torch's own words for a foreign file advise to load it unsafely
            raise CommandError(
                f"{self.path} is damaged or no checkpoint of this run: remove it to begin {self.run.method.upper()} again by "
                "--resume, or start a new run in another folder with --out"
            ) from error
        return True

    def _load(self) -> None:
        """Read the checkpoint; raise where it is not one of this run."""
        with torch.serialization.safe_globals(CHECKPOINT_TYPES):
            state = torch.load(self.path, map_location=torch.device(self.settings.device), weights_only=True)
        run = state["run"]
        if not isinstance(run, Run) or (run.method, type(run.records)) != (self.run.method, list):
            raise ValueError("not a run of this method")
        if not all(isinstance(each, self.method.evaluation_type) for each in (run.before, run.after)):
            raise ValueError("a run without its evaluations")
        if not 1 <= run.done <= self.settings.steps:
            raise ValueError(f"{run.done} steps done of {self.settings.steps}")
        if run.done < self.settings.steps:
            self.method.student.load_state_dict(state["student"])
            self.optimizer.load_state_dict(state["optimizer"])
        self.run = run

    def save(self) -> None:
        """Write the checkpoint; that of a finished run has neither the optimizer's state nor the weights."""
        state: dict[str, Any] = {"run": self.run}
        if self.run.done < self.settings.steps:
            state |= {"student": self.method.student.state_dict(), "optimizer": self.optimizer.state_dict()}
        files.save(self.path, state, torch.save)

    def checkpoint_bytes(self) -> int:
        """Return the size of a checkpoint: weights and both moments."""
        whole, trained = (
            sum(each.numel() * each.element_size() for each in parameters)
            for parameters in (self.method.student.parameters(), self.trained)
        )
        return whole + 2 * trained

    def steps(self) -> Iterator[Record]:
        """Train on, and yield every record as it comes."""
        run, settings = self.run, self.settings
        if run.before is None:
            yield self._evaluated(self.known)
        while run.done < settings.steps:
            record = self._step(run.done)
            run.done += 1
            run.records.append(record)
            yield record
            if run.done % settings.evaluate_every == 0 or run.done == settings.steps:
                yield self._evaluated()
                self.save()

    def _evaluated(self, known: Any = None) -> Record:
        """Evaluate the student, and return the record."""
        evaluation = known or self.method.evaluate(self.run.before is None)
        self.run.before = self.run.before or evaluation
        self.run.after = evaluation
        record = {"method": self.run.method, "step": self.run.done, **evaluation.numbers()}
        self.run.records.append(record)
        return record

    def _step(self, index: int) -> Record:
        """Take a step, and return its record."""
        settings, device = self.settings, torch.device(self.settings.device)
        seed = settings.seed * STEP_SEED + index
        start = time.perf_counter()
        torch.manual_seed(seed)
        batch, numbers = self.method.batch(index)
        sampled = time.perf_counter()
        objective = self.method.objective(batch, generator=torch.Generator(device).manual_seed(seed))
        losses = time.perf_counter()
        objective.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.trained, settings.clip)
        backward = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * schedule(index, settings.steps, settings.warmup)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.method.objective.after_step()
        self.run.pair = self.method.window_pair(objective, batch) or self.run.pair
        end = time.perf_counter()
        metrics = {name: value.item() for name, value in objective.metrics.items()}
        seconds = {"rollouts": sampled - start, "objective": losses - sampled, "backward": backward - losses}
        seconds |= {"optimizer": end - backward, "step": end - start}
        return {
            "method": self.run.method,
            "step": index + 1,
            **metrics,
            **numbers,
            "gradient_norm": norm.item(),
            **{f"seconds_{name}": value for name, value in seconds.items()},
            "tokens_a_second": metrics["tokens"] / (end - start),
            "memory_mib": used_mib(device),
        }
