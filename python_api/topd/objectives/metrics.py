"""What an objective reports of a step beside its loss: times of its stages, means of its scores, numbers of the near future."""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from topd.branching.continuations import BRANCHES
from topd.objectives.config import OPDConfig
from topd.objectives.diagnostics import Measured, Totals, diagnostics_of, totals_of
from topd.objectives.inputs import Inputs
from topd.objectives.objective import NearFuture
from topd.objectives.observers import NOBODY, Observer
from topd.objectives.token_losses import TokenLosses
from topd.scores import TokenScores


class Stages:
    """Wall time of the stages, in seconds; on a GPU that of the host. Those named here stand at 0 where they do not run."""

    def __init__(self, *names: str, observer: Observer = NOBODY) -> None:
        self.seconds = {f"seconds_{name}": 0.0 for name in names}
        self.observer = observer

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what runs in this block."""
        start = time.perf_counter()
        self.observer.stage_begins(name)
        try:
            yield
        finally:
            self.observer.stage_ends(name)
        self.seconds[f"seconds_{name}"] = time.perf_counter() - start


def mean_scores(scores: TokenScores, response: Tensor) -> dict[str, Tensor]:
    """Return the means over the response tokens; 0 where there is none."""
    count = response.sum().clamp_min(1)
    names = ("student_entropy", "teacher_entropy", "student_lost_mass", "teacher_lost_mass")
    return {name: getattr(scores, name).sum() / count for name in names}


def diagnosed(losses: TokenLosses, inputs: Inputs, config: OPDConfig) -> tuple[Totals, dict[str, Tensor]]:
    """Return the sums over the response tokens that diagnostics are made of, and the diagnostics by name."""
    rollouts, scores = inputs.rollouts, losses.scores
    assert scores.student_logprob is not None
    assert scores.teacher_logprob is not None
    divergence, verdict = losses.unclipped, None
    if config.hard_weight:
        divergence = divergence + config.hard_weight * scores.student_logprob
    if inputs.verdict is not None:
        places = torch.arange(rollouts.input_ids.numel(), device=rollouts.input_ids.device)
        verdict = inputs.verdict[rollouts.row_of(places)].reshape(rollouts.input_ids.shape)
    measured = Measured(
        divergence,
        rollouts.response,
        rollouts.input_ids,
        scores.student_logprob,
        scores.teacher_logprob,
        config.position_clip,
        verdict,
        *losses.measures,
    )
    totals = totals_of(measured)
    return totals, diagnostics_of(measured, totals)


def near_future_metrics(near_future: NearFuture) -> dict[str, Tensor | float]:
    """Return the counts of candidates and divergent points, medians of their distances, and what windows and transport did."""
    windows, real, distance = near_future.windows, near_future.divergent, near_future.transport.distance
    candidates, points = real.numel(), real.sum()

    def median(values: Tensor) -> Tensor | float:
        return values.median() if values.numel() else math.nan

    lengths = torch.cat([windows.student_lengths, windows.teacher_lengths])
    return {
        "candidates": candidates,
        "divergent_points": points,
        "false_alarms": candidates - points,
        "low_divergence_share": (candidates - points) / max(candidates, 1),
        "distance_divergent": median(distance[real]),
        "distance_false_alarm": median(distance[~real]),
        "marginal_error": near_future.transport.marginal_error.max() if candidates else 0.0,
        "window_length": lengths.float().mean() if candidates else 0.0,
        "student_branches": float(windows.student_way == BRANCHES),
        "teacher_branches": float(windows.teacher_way == BRANCHES),
    }


def as_metrics(values: Mapping[str, Tensor | float]) -> dict[str, Tensor]:
    """Return float tensors without a gradient."""
    return {
        name: value.detach().float() if isinstance(value, Tensor) else torch.tensor(float(value))
        for name, value in values.items()
    }
