"""TOPD's guidance in a step: L_traj at the divergent points, reduced over those of all processes whose candidates are judged
together."""

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from topd.branching.continuations import rollout_states
from topd.branching.replay import replay
from topd.near_future.guidance import guidance_kl
from topd.objectives.config import TOPDConfig
from topd.objectives.gating import Verdict
from topd.objectives.look_ahead import Pass
from topd.objectives.metrics import Stages
from topd.objectives.objective import NearFuture
from topd.objectives.reduction import own_items, reduce_tokens


class Reducing(NamedTuple):
    """What the loss of a step is reduced by.

    Attributes:
        config: its options.
        items: the denominator of a larger batch; None: this batch's own.
        share: [], of `reduce_tokens`.
        verdict: the gate's, which knows the points of all processes.
    """

    config: TOPDConfig
    items: float | Tensor | None
    share: Tensor
    verdict: Verdict


def guidance_of(tokens: Pass, near_future: NearFuture, step: Reducing, stages: Stages) -> Tensor:
    """Return this part's guidance, L_traj reduced over the divergent points, 0 where there is none; no gradient where it weighs
    nothing."""
    chosen = near_future.divergent.nonzero()[:, 0]
    if not chosen.numel() and step.config.student_window == "rollout":
        return tokens.losses.loss.new_zeros(())
    with nullcontext() if step.config.guidance_weight else torch.no_grad():
        with stages.stage("window_forward"):
            hidden = _states_of(tokens, near_future, chosen, step.config)
        if not chosen.numel():  # other processes may have windows: their backward passes gather the layers too
            return tokens.losses.loss.new_zeros(()) + hidden.sum()
        stages.observer.tensor("window_hidden", hidden)
        with stages.stage("guidance"):
            per_point = _of_points(tokens, near_future, chosen, hidden, step.config)
    rollouts, reduction = tokens.inputs.rollouts, step.config.reduction
    if step.config.guidance_reduction == "points":
        if step.verdict.items is None:
            return step.share * per_point.mean()
        # All parts that were judged together, in units of this one: each point weighs the same in whichever part it stands.
        parts = step.verdict.items / own_items(rollouts, reduction).clamp_min(1)
        return step.share * (parts / step.verdict.points).to(step.share.dtype) * per_point.sum()
    positions = near_future.windows.positions[chosen].unbind(-1)
    of_tokens = per_point.new_zeros(rollouts.response.shape).index_put(positions, per_point)
    return reduce_tokens(of_tokens, rollouts, reduction, step.items).loss


def _states_of(tokens: Pass, near_future: NearFuture, chosen: Tensor, config: TOPDConfig) -> Tensor:
    """Return [m, K, H], the student's states that predict the chosen points' windows."""
    windows, states = near_future.windows, tokens.student_states
    positions, lengths = windows.positions[chosen], windows.student_lengths[chosen]
    student_tokens = windows.student_tokens[chosen]
    if config.student_window == "rollout":
        return rollout_states(states, positions, lengths, student_tokens.shape[1])
    return replay(tokens.student, states, positions, student_tokens, lengths)


def _of_points(tokens: Pass, near_future: NearFuture, chosen: Tensor, hidden: Tensor, config: TOPDConfig) -> Tensor:
    """Return L_traj of the chosen points, [m], whose windows have these states."""
    windows = near_future.windows
    return guidance_kl(
        hidden,
        tokens.student.head,
        windows.teacher_tokens[chosen],
        near_future.transport.plan[chosen],
        student_lengths=windows.student_lengths[chosen],
        temperature=config.temperature,
    )
