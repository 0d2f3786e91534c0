"""Trajectory-aware on-policy distillation: where the loss is high and the near future differs, the teacher's guides.

    L = L_OPD + lambda * mean over divergent points of L_traj
    L_traj(t) = 1 / K_S sum_i KL(target_i || p_S(. | x, y_<t, x^S_<i)),  target_i row i of the transport plan, normalised

Nothing is computed twice: the student's one forward with gradient fills the cache that its windows grow from and that their
states are computed on; the teacher's one forward gives states and cache; one `linear_divergence` gives the loss and the scores
that choose the candidates, and weights that change afterwards at false alarms cost only those rows.
"""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from topd.branching.continuations import BRANCHES, continue_from, from_rollout, rollout_states
from topd.branching.windows import Windows, replay
from topd.checks.rollouts import check_generator, end_tokens
from topd.models.decoder import Decoder, vocabulary_of
from topd.near_future.candidates import select_candidates
from topd.near_future.false_alarms import false_alarm_weights
from topd.near_future.gate import divergent
from topd.near_future.guidance import guidance_kl
from topd.near_future.transport import Transport, near_future_divergence
from topd.objectives.batch import (
    KEYS,
    Rollouts,
    Stages,
    TokenPass,
    as_metrics,
    check_batch,
    check_items,
    check_keys,
    mean_scores,
    reduce_tokens,
    token_pass,
)
from topd.objectives.config import TOPDConfig, config_of
from topd.objectives.model_checks import ModelChecks
from topd.objectives.objective import NearFuture, Objective
from topd.objectives.topk_teacher import refuse_topk
from topd.scores import TokenScores


class TOPD:
    """The objective.

    Args:
        student, teacher: as of `OPD`. Both are used in the mode that they are in.
        config: TOPDConfig; None: its defaults.
        allow_unequal_vocabularies: as of `OPD`.

    Raises:
        TypeError: config of another type, that of another method too; a model that is none of transformers.
        ValueError: no teacher; vocabularies that differ by more than padding; an embedding that lacks tokens which both
            models have.

    Source: arXiv 2606.00305.
    """

    def __init__(
        self, student: Any, teacher: Any, config: TOPDConfig | None = None, *, allow_unequal_vocabularies: bool = False
    ) -> None:
        self.student, self.teacher, self.config = student, teacher, config_of(config, TOPDConfig)
        if teacher is None:
            raise ValueError(
                "teacher must be a model, which continues from prefixes of the rollouts, got None; a teacher of whom only the "
                "top-k is known serves topd.OPD"
            )
        self.allow_unequal_vocabularies = allow_unequal_vocabularies
        self._checks = ModelChecks(student, teacher, allow_unequal_vocabularies)
        if isinstance(self.config.embedding, Tensor):
            _check_table(self.config.embedding, min(vocabulary_of(student), vocabulary_of(teacher)))

    def __call__(
        self,
        batch: Mapping[str, Tensor],
        *,
        num_items: float | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Objective:
        """The loss of rollouts that the student sampled.

        Args:
            batch: input_ids [B, T] int64; attention_mask and response_mask [B, T] bool, or integers 0 and 1. A response token
                and the one before it are attended. Every token is one of both models. A response may be empty, and so may the
                batch: the loss and its gradients are then 0. No other key.
            num_items: the denominator of a larger batch of which this is a part (gradient accumulation): its response tokens,
                or with reduction "sequence" its responses. The guidance, gated in this part alone, is weighted by this part's
                share of it. None: this batch's own.
            generator: of the models' device, for the windows; None: torch's own.

        Returns:
            Objective with near_future. Metrics of `OPD`, and guidance_loss (loss = opd_loss + guidance_weight * guidance_loss),
            candidates, divergent_points, false_alarms (counts), low_divergence_share (false alarms among candidates),
            distance_divergent, distance_false_alarm (medians, NaN where there is none), marginal_error (the largest),
            window_length (mean over both models' windows), student_branches, teacher_branches (0 where windows came another
            way), second_forward (1 where the student had to do without a cache), and seconds_student_windows,
            seconds_teacher_windows, seconds_transport, seconds_window_forward, seconds_guidance.

        Raises:
            TypeError, ValueError: a wrong type, shape, dtype, device or range; an unknown key; a token that one of the models
                does not have (checked on the CPU); gradients that several processes would not exchange.
        """
        refuse_topk(batch, "TOPD")
        rollouts, items, config = check_batch(batch), check_items(num_items), self.config
        check_keys(batch, KEYS)
        check_generator(generator)
        self._checks.before_step(self.student, self.teacher)
        stages = Stages("window_forward", "guidance")
        found = token_pass(self.student, self.teacher, rollouts, config, stages, cache=True)
        score = score_of(found.scores, config.score)
        positions = select_candidates(
            score,
            mask=rollouts.response,
            rule=config.candidates,
            value=config.candidate_value,
            min_separation=config.min_separation,
        )
        windows = self._windows(found, rollouts, positions, stages, generator)
        with stages.stage("transport"):
            transport = self._transport(found, rollouts, windows)
        real = divergent(transport.distance, rule=config.gate, value=config.gate_value)
        weights = None
        if config.false_alarms != "keep":
            weights = false_alarm_weights(score, positions, real, mask=rollouts.response, mode=config.false_alarms)
        opd_loss, share = reduce_tokens(found.loss, rollouts.response, config.reduction, items, weights)
        guidance = share * self._guidance(found, rollouts, windows, transport, real, stages)
        loss = opd_loss + config.guidance_weight * guidance if config.guidance_weight else opd_loss
        near_future = NearFuture(windows, transport, real, score)
        metrics: dict[str, Tensor | float] = {
            "loss": loss,
            "opd_loss": opd_loss,
            "guidance_loss": guidance,
            "tokens": rollouts.response.sum(),
            "sequence_reduction": float(config.reduction == "sequence"),
            "second_forward": float(found.student_states.layers is None),
            **mean_scores(found.scores, rollouts.response),
            **_near_future_metrics(near_future),
            **stages.seconds,
        }
        return Objective(loss, as_metrics(metrics), found.scores, near_future)

    def _windows(
        self, found: TokenPass, rollouts: Rollouts, positions: Tensor, stages: Stages, generator: torch.Generator | None
    ) -> Windows:
        config = self.config
        own, others = found.student.head.weight.shape[0], found.teacher.head.weight.shape[0]
        table = _table(config.embedding, found.student, found.teacher)
        drawn = own if table is None else min(own, table.shape[0])
        ids, attended = rollouts.input_ids, rollouts.attended
        options: dict[str, Any] = {
            "horizon": config.horizon,
            "temperature": config.window_temperature,
            "generator": generator,
            "ends": end_tokens(None, found.student.model),
        }
        with stages.stage("student_windows"):
            if config.student_window == "rollout":
                students = from_rollout(ids, attended, positions, config.horizon)
            else:
                cached = found.student_states
                students = continue_from(found.student, ids, attended, positions, found=cached, vocab=drawn, **options)
        with stages.stage("teacher_windows"):
            cached, common = found.teacher_states, min(own, others)
            teachers = continue_from(found.teacher, ids, attended, positions, found=cached, vocab=common, **options)
        return Windows(
            positions, students.tokens, teachers.tokens, students.lengths, teachers.lengths, students.way, teachers.way
        )

    @torch.no_grad()
    def _transport(self, found: TokenPass, rollouts: Rollouts, windows: Windows) -> Transport:
        config = self.config
        options: dict[str, Any] = {"cost": config.cost, "solver": config.solver, "epsilon": config.epsilon}
        options |= {"student_lengths": windows.student_lengths, "teacher_lengths": windows.teacher_lengths}
        table = _table(config.embedding, found.student, found.teacher)
        if table is None:
            vectors = [
                self._states_at(found, rollouts, windows.positions, tokens, length)
                for tokens, length in (
                    (windows.student_tokens, windows.student_lengths),
                    (windows.teacher_tokens, windows.teacher_lengths),
                )
            ]
            return near_future_divergence(student_vectors=vectors[0], teacher_vectors=vectors[1], **options)
        return near_future_divergence(windows.student_tokens, windows.teacher_tokens, table.detach(), **options)

    def _states_at(self, found: TokenPass, rollouts: Rollouts, positions: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
        """[m, K, H], the student's state at each token of a window: the one that would predict the next."""
        longer = torch.cat([tokens, torch.zeros_like(tokens[:, :1])], dim=1)
        states = found.student_states.constant()
        return replay(found.student, states, rollouts.input_ids, rollouts.attended, positions, longer, lengths + 1)[:, 1:]

    def _guidance(
        self, found: TokenPass, rollouts: Rollouts, windows: Windows, transport: Transport, real: Tensor, stages: Stages
    ) -> Tensor:
        """The mean over divergent points, 0 where there is none; no gradient where it weighs nothing."""
        chosen = real.nonzero()[:, 0]
        if not chosen.numel():
            return found.loss.new_zeros(())
        positions, lengths = windows.positions[chosen], windows.student_lengths[chosen]
        tokens, states = windows.student_tokens[chosen], found.student_states
        with nullcontext() if self.config.guidance_weight else torch.no_grad():
            with stages.stage("window_forward"):
                if self.config.student_window == "rollout":
                    hidden = rollout_states(states.hidden, rollouts.attended, positions, lengths, tokens.shape[1])
                else:
                    ids, attended = rollouts.input_ids, rollouts.attended
                    hidden = replay(found.student, states, ids, attended, positions, tokens, lengths)
            with stages.stage("guidance"):
                per_point = guidance_kl(
                    hidden,
                    found.student.head,
                    windows.teacher_tokens[chosen],
                    transport.plan[chosen],
                    student_lengths=lengths,
                    temperature=self.config.temperature,
                )
        return per_point.mean()


def _table(embedding: str | Tensor, student: Decoder, teacher: Decoder) -> Tensor | None:
    """Return the embeddings that windows' tokens are looked up in; None where their states are compared."""
    if isinstance(embedding, Tensor):
        return embedding
    if embedding == "student_hidden":
        return None
    side = student if embedding == "student" else teacher
    weight: Tensor = side.model.get_input_embeddings().weight
    return weight


def _check_table(embedding: Tensor, common: int) -> None:
    """Check that a table [V, d] has a row for each token that both models have."""
    if embedding.shape[0] < common:
        raise ValueError(
            f"embedding must have a row for each of the {common:,} tokens that both models have, got {list(embedding.shape)}; "
            'give the rest a row, or take "student" or "teacher"'
        )


def score_of(scores: TokenScores, name: str) -> Tensor:
    """[B, T], by which candidates are chosen."""
    assert scores.teacher_logprob is not None
    assert scores.student_logprob is not None
    if name == "reverse_kl":
        return scores.reverse_kl
    if name == "gap":
        return scores.student_logprob - scores.teacher_logprob
    return -(scores.teacher_logprob if name == "teacher_nll" else scores.student_logprob)


def _near_future_metrics(found: NearFuture) -> dict[str, Tensor | float]:
    windows, real, distance = found.windows, found.divergent, found.transport.distance
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
        "marginal_error": found.transport.marginal_error.max() if candidates else 0.0,
        "window_length": lengths.float().mean() if candidates else 0.0,
        "student_branches": float(windows.student_way == BRANCHES),
        "teacher_branches": float(windows.teacher_way == BRANCHES),
    }
