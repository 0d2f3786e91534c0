"""One method's run: rollouts of the student, the objective, an optimizer step; evaluations, checkpoints, and going on from one.

Nothing random is carried from step to step: rollouts and windows of step n are drawn from (seed, n), so that a run that goes on
from a checkpoint gets the very numbers that it would have got.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import topd
from topd import files
from topd.cli.errors import CommandError
from topd.cli.memory import used_mib
from topd.integrations.rollouts import sample_rollouts
from topd_demo.evaluation import Evaluation, evaluate
from topd_demo.models import Models
from topd_demo.prompts import Prompts, encode
from topd_demo.settings import Settings
from topd_demo.window_pair import WindowPair, furthest_pair

Record = dict[str, Any]
STEP_SEED = 100_003  # rollouts of step n are drawn from seed * STEP_SEED + n


@dataclass
class Run:
    """What a method has done so far.

    Attributes:
        records: a mapping a step, and one for each evaluation, as they stand in metrics.jsonl.
        before, after: the first and the latest evaluation.
        pair: of TOPD, the two windows of the latest step that are furthest apart.
    """

    method: str
    done: int = 0
    records: list[Record] = field(default_factory=list)
    before: Evaluation | None = None
    after: Evaluation | None = None
    pair: WindowPair | None = None


def schedule(index: int, steps: int, warmup: int) -> float:
    """Return the factor of the learning rate at a step: a linear warm-up, then a linear fall to a tenth."""
    if index < warmup:
        return (index + 1) / warmup
    return 1.0 - 0.9 * (index - warmup) / max(steps - 1 - warmup, 1)


class Trainer:
    """Trains the student of `models` by one method.

    Args:
        start: the student's weights to start from.
        before: their evaluation, where it is known.
        folder: where the checkpoint stands.
    """

    def __init__(
        self,
        method: str,
        models: Models,
        start: dict[str, Tensor],
        before: Evaluation | None,
        prompts: Prompts,
        settings: Settings,
        folder: Path,
    ) -> None:
        self.models, self.prompts, self.settings = models, prompts, settings
        self.path = folder / f"checkpoint-{method}.pt"
        self.run, self.known = Run(method), before
        models.student.load_state_dict(start)
        options: dict[str, Any] = {"lr": settings.learning_rate, "betas": (0.9, 0.95), "weight_decay": 0.0, "fused": True}
        self.optimizer = torch.optim.AdamW(models.student.parameters(), **options)
        pair = models.student, models.teacher
        if method == "topd":  # the tokenizers are equal, padding beyond them need not be
            config = topd.TOPDConfig(horizon=settings.horizon)
            self.objective: topd.OPD | topd.TOPD = topd.TOPD(*pair, config, allow_unequal_vocabularies=True)
        else:
            self.objective = topd.OPD(*pair, allow_unequal_vocabularies=True)

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
        with torch.serialization.safe_globals([Run, Evaluation, WindowPair]):
            state = torch.load(self.path, map_location=torch.device(self.settings.device), weights_only=True)
        run = state["run"]
        if not isinstance(run, Run) or (run.method, type(run.records)) != (self.run.method, list):
            raise ValueError("not a run of this method")
        if not (isinstance(run.before, Evaluation) and isinstance(run.after, Evaluation)):
            raise ValueError("a run without its evaluations")
        if not 1 <= run.done <= self.settings.steps:
            raise ValueError(f"{run.done} steps done of {self.settings.steps}")
        if run.done < self.settings.steps:
            self.models.student.load_state_dict(state["student"])
            self.optimizer.load_state_dict(state["optimizer"])
        self.run = run

    def save(self) -> None:
        """Write the checkpoint; that of a finished run has neither the optimizer's state nor the weights."""
        state: dict[str, Any] = {"run": self.run}
        if self.run.done < self.settings.steps:
            state |= {"student": self.models.student.state_dict(), "optimizer": self.optimizer.state_dict()}
        files.save(self.path, state, torch.save)

    def checkpoint_bytes(self) -> int:
        """Return the size of a checkpoint: weights and both moments."""
        parameters: list[Tensor] = list(self.models.student.parameters())
        return 3 * sum(p.numel() * p.element_size() for p in parameters)

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

    def _evaluated(self, known: Evaluation | None = None) -> Record:
        """Evaluate the student, and return the record."""
        evaluation = known or evaluate(self.models, self.prompts.held_out, self.settings)
        self.run.before = self.run.before or evaluation
        self.run.after = evaluation
        record = {"method": self.run.method, "step": self.run.done, "held_out_reverse_kl": evaluation.reverse_kl}
        self.run.records.append(record)
        return record

    def _step(self, index: int) -> Record:
        """Take a step, and return its record."""
        settings, student = self.settings, self.models.student
        device, seed = torch.device(settings.device), settings.seed * STEP_SEED + index
        start = time.perf_counter()
        first = index * settings.batch
        ids, attended = encode(self.models.tokenizer, self.prompts.train[first : first + settings.batch], device)
        torch.manual_seed(seed)
        options = {"max_new_tokens": settings.tokens, "vocabulary": self.models.common_vocabulary}
        batch = sample_rollouts(student, ids, attended, **options)
        sampled = time.perf_counter()
        objective = self.objective(batch, generator=torch.Generator(device).manual_seed(seed))
        losses = time.perf_counter()
        objective.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), settings.clip)
        backward = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * schedule(index, settings.steps, settings.warmup)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if objective.near_future is not None:
            self.run.pair = furthest_pair(objective.near_future, batch["input_ids"], self.models.tokenizer) or self.run.pair
        end = time.perf_counter()
        metrics = {name: value.item() for name, value in objective.metrics.items()}
        seconds = {"rollouts": sampled - start, "objective": losses - sampled, "backward": backward - losses}
        seconds |= {"optimizer": end - backward, "step": end - start}
        return {
            "method": self.run.method,
            "step": index + 1,
            **metrics,
            "gradient_norm": norm.item(),
            **{f"seconds_{name}": value for name, value in seconds.items()},
            "tokens_a_second": metrics["tokens"] / (end - start),
            "memory_mib": used_mib(device),
        }
