"""One run: a start student is trained on its own rollouts by one row's objective, and measured on held-out problems."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import topd
from quality.compute import Cost, step_flop
from quality.generation import accuracy, answer, rollouts
from quality.methods import ROWS, objective_of
from quality.models import Report, schooled
from quality.settings import Settings
from quality.statistics import rank_auc
from quality.tasks import TASKS
from quality.tasks.task import Task

Record = dict[str, Any]
THIRDS = 3
# What a seed's generators are for; each has a stream of its own in each step.
PROMPTS, ROLLOUTS, WINDOWS, HELD_OUT = range(4)


@dataclass(frozen=True)
class Job:
    """A run to do: which task, seed and row, under which settings; models are kept in the folder."""

    task: str
    seed: int
    row: str
    settings: Settings
    folder: Path

    @property
    def plan(self) -> Record:
        """All that the result depends on beside task, seed and row."""
        plan = asdict(self.settings)
        return plan | {"student": asdict(self.settings.student(0)), "teacher": asdict(self.settings.teacher())}


@dataclass
class Gate:
    """What the gate said of the candidates of one third of the steps, beside the oracle."""

    surface: list[Tensor] = field(default_factory=list)
    divergent: list[Tensor] = field(default_factory=list)
    distance: list[Tensor] = field(default_factory=list)

    def add(self, near: topd.NearFuture, surface: Tensor) -> None:
        """Note a step's candidates; surface [B, T] bool is the oracle."""
        row, column = near.windows.positions.unbind(-1)
        self.surface.append(surface[row, column])
        self.divergent.append(near.divergent)
        self.distance.append(near.transport.distance)

    def record(self) -> Record:
        """Return counts of candidates, by oracle and gate, and how well the distance tells real ones from surface."""
        surface, divergent, distance = (torch.cat(part) for part in (self.surface, self.divergent, self.distance))
        return {
            "real_divergent": int((~surface & divergent).sum()),
            "real_alarm": int((~surface & ~divergent).sum()),
            "surface_divergent": int((surface & divergent).sum()),
            "surface_alarm": int((surface & ~divergent).sum()),
            "distance_auc": rank_auc(distance[~surface].tolist(), distance[surface].tolist()),
            "distance_real": float(distance[~surface].mean()) if (~surface).any() else None,
            "distance_surface": float(distance[surface].mean()) if surface.any() else None,
        }


def stream(seed: int, step: int, use: int) -> torch.Generator:
    """Return the generator of one use in one step of a seed: the same for every row."""
    return torch.Generator().manual_seed((seed * 10_000 + step) * 8 + use)


def surface_of(task: Task, prompts: Tensor, answers: Tensor) -> Tensor:
    """Return the oracle over whole rollouts, [n, P + L] bool."""
    return torch.cat([torch.zeros_like(prompts, dtype=torch.bool), task.surface(answers)], dim=1)


def run(job: Job, report: Report) -> Record:
    """Train and measure; the same job gives the same record, but for the seconds."""
    task, settings, row = TASKS[job.task], job.settings, ROWS[job.row]
    teacher = schooled(task, settings.teacher(), job.folder, report).requires_grad_(False)
    student = schooled(task, settings.student(job.seed), job.folder, report)
    objective = objective_of(row, student, teacher)
    optimizer = torch.optim.AdamW(student.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    held_out = task.problems(settings.problems, stream(job.seed, 0, HELD_OUT), held_out=True)
    costs, flop, losses = (Cost.of(student), Cost.of(teacher)), 0.0, []
    gates = [Gate() for _ in range(THIRDS)]
    curve = [{"step": 0, "flop": 0.0, "accuracy": accuracy(student, task, held_out)}]
    for step in range(settings.steps):
        prompts = task.problems(settings.batch, stream(job.seed, step, PROMPTS), held_out=False)
        answers = answer(student, prompts, task.answer_length, stream(job.seed, step, ROLLOUTS))
        batch, surface = rollouts(prompts, answers), surface_of(task, prompts, answers)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * min(1.0, 10 * (step + 1) / settings.steps)
        result = objective(batch, surface, stream(job.seed, step, WINDOWS))
        result.loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        lengths = batch["response_mask"].sum(-1).tolist()
        flop += step_flop(row, *costs, task.prompt_length, lengths, result)
        losses.append(float(result.scores.reverse_kl.sum() / batch["response_mask"].sum()))
        if result.near_future is not None:
            gates[THIRDS * step // settings.steps].add(result.near_future, surface)
        if (step + 1) % settings.evaluate_every == 0 or step + 1 == settings.steps:
            curve.append({"step": step + 1, "flop": flop, "accuracy": accuracy(student, task, held_out)})
    record: Record = {"task": job.task, "seed": job.seed, "row": job.row, "curve": curve, "reverse_kl": losses}
    if row.near_future is not None:
        record["gate"] = [gate.record() for gate in gates if gate.surface]
    return record | {"plan": job.plan}
