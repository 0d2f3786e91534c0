"""Local correction: a few updates on the guidance at divergent points alone, and what they do to the distance there.

The paper takes five updates, and the distance falls from 0.538 to 0.350 to 0.204 (arXiv 2606.00305, 5.2).
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import topd
from quality.generation import answer, rollouts
from quality.methods import CANDIDATES, HORIZON
from quality.models import schooled
from quality.settings import SETTINGS
from quality.tables import spread
from quality.tasks import TASKS
from quality.training import PROMPTS, ROLLOUTS, WINDOWS, stream
from topd.cli.options import positive
from topd_bench.report import markdown_table, note

UPDATES, DRAWS, ROWS = 5, 4, 64
Batch = dict[str, Tensor]


def distance(student: Any, teacher: Any, batch: Batch, positions: Tensor, seed: int) -> float:
    """Return the mean distance between windows from these positions, over DRAWS draws that no update has seen."""
    means = []
    for draw in range(DRAWS):
        windows = _windows(student, teacher, batch, positions, stream(seed, 100 + draw, WINDOWS))
        means.append(float(_transport(student, windows).distance.mean()))
    return statistics.mean(means)


def _windows(student: Any, teacher: Any, batch: Batch, positions: Tensor, generator: torch.Generator) -> topd.Windows:
    ids, attended = batch["input_ids"], batch["attention_mask"]
    return topd.sample_windows(student, teacher, ids, attended, positions, horizon=HORIZON, generator=generator)


def _transport(student: Any, windows: topd.Windows) -> topd.Transport:
    table = student.get_input_embeddings().weight.detach()
    lengths: dict[str, Any] = {"student_lengths": windows.student_lengths, "teacher_lengths": windows.teacher_lengths}
    return topd.near_future_divergence(windows.student_tokens, windows.teacher_tokens, table, **lengths)


def guided(student: Any, teacher: Any, batch: Batch, positions: Tensor, generator: torch.Generator) -> Tensor:
    """Return the mean of L_traj over the positions, on fresh windows."""
    windows = _windows(student, teacher, batch, positions, generator)
    _, hidden = topd.window_hidden(student, batch["input_ids"], batch["attention_mask"], windows)
    plan, lengths = _transport(student, windows).plan, windows.student_lengths
    head = topd.Head.from_model(student)
    return topd.guidance_kl(hidden, head, windows.teacher_tokens, plan, student_lengths=lengths).mean()


def by_token(student: Any, teacher: Any, batch: Batch, positions: Tensor, generator: torch.Generator) -> Tensor:
    """Return OPD's loss at the positions alone."""
    weights = torch.zeros(batch["input_ids"].shape)
    weights[positions[:, 0], positions[:, 1]] = 1.0
    opd = topd.OPD(student, teacher)
    return opd({**batch, "token_weights": weights}, num_items=float(len(positions))).loss


LOSSES: dict[str, Callable[..., Tensor]] = {"guidance": guided, "OPD at the same points": by_token}


def corrected(task_name: str, seed: int, loss: str, folder: Path) -> list[float]:
    """Return the distance at the divergent points of one batch, before and after each update."""
    task, settings = TASKS[task_name], SETTINGS[task_name]
    teacher = schooled(task, settings.teacher(), folder, note).requires_grad_(False)
    student = schooled(task, settings.student(seed), folder, note)
    prompts = task.problems(ROWS, stream(seed, 0, PROMPTS), held_out=False)
    batch = rollouts(prompts, answer(student, prompts, task.answer_length, stream(seed, 0, ROLLOUTS)))
    options = topd.TOPDConfig(candidate_value=CANDIDATES, horizon=HORIZON)
    with torch.no_grad():
        near = topd.TOPD(student, teacher, options)(batch, generator=stream(seed, 0, WINDOWS)).near_future
    assert near is not None
    positions = near.windows.positions[near.divergent]
    optimizer = torch.optim.AdamW(student.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    distances = [distance(student, teacher, batch, positions, seed)]
    for update in range(UPDATES):
        LOSSES[loss](student, teacher, batch, positions, stream(seed, 1 + update, WINDOWS)).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        distances.append(distance(student, teacher, batch, positions, seed))
    return distances


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command: a table a task."""
    parser = argparse.ArgumentParser(prog="python -m quality.correction", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", type=positive, default=4)
    parser.add_argument("--out", type=Path, default=Path("quality-results"), help="folder (default quality-results)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for task in options.tasks:
        lines = []
        for loss in LOSSES:
            runs = [corrected(task, seed, loss, options.out / "models") for seed in range(options.seeds)]
            lines.append([loss, *(spread(list(values)) for values in zip(*runs, strict=True))])
        header = ["updates on", "before", *(f"after {update + 1}" for update in range(UPDATES))]
        print(
            f"\n{task}: distance at the divergent points of one batch, {options.seeds} seeds\n\n{markdown_table(header, lines)}"
        )


if __name__ == "__main__":
    main()
