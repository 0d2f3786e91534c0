"""On-policy distillation: a divergence at every token of the student's own rollouts.

    L = mean over response tokens of KL(p_S(. | x, y_<t) || p_T(. | x, y_<t))

One forward of each model and one `linear_divergence`, which gives the loss and every score; or, where the teacher is known by
its top-k alone, the student's forward and `topd.objectives.topk_teacher`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from topd.checks.rollouts import check_generator
from topd.objectives.batch import Batch, check_batch, open_models, token_losses
from topd.objectives.config import OPDConfig, config_of
from topd.objectives.method import Method
from topd.objectives.metrics import Stages, as_metrics, mean_scores
from topd.objectives.model_checks import ModelChecks
from topd.objectives.objective import Objective
from topd.objectives.reduction import check_items, reduce_tokens
from topd.objectives.topk_teacher import direction_of, refuse_topk, take_topk, topk_losses
from topd.scores import TokenScores


class OPD(Method):
    """On-policy distillation: the loss of rollouts that the student sampled.

    Args:
        student: a causal language model of transformers, also inside PEFT; its parameters that require grad are trained. A
            data-parallel wrapper (DDP, FSDP, DeepSpeed) goes around a module whose forward takes this loss, not around the
            student alone: in several processes that is refused, with the module written out. torch.compile goes around the base
            model or its layers.
        teacher: likewise; constant. Put it in eval mode. None: batches hold the teacher's top-k.
        config: OPDConfig; None: its defaults. Without a teacher model its divergence is "forward_kl" or "reverse_kl".
        allow_unequal_vocabularies: compare vocabularies whose sizes differ by more than padding (more than 1,024 entries or
            more than 1 % of the larger) on the entries that both have. What each model says beyond them is lost: the metrics
            student_lost_mass and teacher_lost_mass.

    Raises:
        TypeError: config of another type, that of another method too; a model that is none of transformers.
        ValueError: vocabularies that differ by more than padding; a divergence that a top-k does not determine, or a
            topk_support beside a teacher model.

    Source: arXiv 2606.00305, L_OPD.
    """

    def __init__(
        self, student: Any, teacher: Any, config: OPDConfig | None = None, *, allow_unequal_vocabularies: bool = False
    ) -> None:
        self.student, self.teacher, self.config = student, teacher, config_of(config, OPDConfig)
        if teacher is None:
            direction_of(self.config)
        elif self.config.topk_support != "tail":
            raise ValueError(
                "config.topk_support is for a teacher known by its top-k, got "
                f"{self.config.topk_support!r} and a teacher model; leave it out, or pass teacher=None"
            )
        self.allow_unequal_vocabularies = allow_unequal_vocabularies
        self._checks = ModelChecks(student, teacher, allow_unequal_vocabularies)

    def __call__(
        self,
        batch: Mapping[str, Tensor],
        *,
        num_items: float | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Objective:
        """Return the loss of rollouts that the student sampled.

        Args:
            batch: input_ids [B, T] int64; attention_mask and response_mask [B, T] bool, or integers 0 and 1. A response token
                and the one before it are attended. Every token is one of both models. A response may be empty, and so may the
                batch: the loss and its gradients are then 0. No other key. Or packed, without padding: input_ids [N] int64,
                cu_seqlens [B + 1] int32, from 0 to N, and response_mask [N], False at the first token of each sequence. Without
                a teacher model also teacher_topk_logprobs, floating, nats, at config.temperature, and teacher_topk_ids, int64,
                both [B, T, k] or [N, k]: the teacher's likely tokens in place of the token in that column, -inf for padding.
            num_items: the denominator of a larger batch of which this is a part (gradient accumulation): its response tokens,
                or with reduction "sequence" its responses. None: this batch's own.
            generator: not used; OPD draws nothing.

        Returns:
            Objective; metrics loss, opd_loss, tokens, sequence_reduction (1 or 0), student_entropy, teacher_entropy (means over
            response tokens, nats), student_lost_mass, teacher_lost_mass (likewise: each model's probability of the entries that
            the other does not have), seconds_student_forward, seconds_teacher_forward, seconds_divergence. With a teacher's
            top-k: no teacher_entropy and no seconds_teacher_forward, but teacher_topk_mass, the mean mass of its k tokens, and
            infinite_tokens, how many have an infinite loss (which passes no gradient). In its scores top1_agreement is None,
            and what a top-k does not say is NaN at response tokens: both KLs, teacher_entropy, both lost masses, and
            teacher_logprob where the token is not among the k.

        Raises:
            TypeError, ValueError: a wrong type, shape, dtype, device or range; an unknown key; a token that one of the models
                does not have (checked on the CPU); a packed batch and a model that cannot keep its sequences apart; gradients
                that several processes would not exchange; a top-k beside a teacher model, or neither.
        """
        check_generator(generator)
        items, stages = check_items(num_items), Stages()
        if self.teacher is None:
            return self._from_topk(batch, items, stages)
        refuse_topk(batch, "OPD")
        rollouts = check_batch(batch)
        self._checks.before_step(self.student, self.teacher)
        student, teacher = open_models(self.student, self.teacher, rollouts)
        with stages.stage("student_forward"):
            student_hidden = rollouts.hidden(student)
        with stages.stage("teacher_forward"), torch.no_grad():
            teacher_hidden = rollouts.hidden(teacher)
        with stages.stage("divergence"):
            loss, scores = token_losses((student_hidden, student.head), (teacher_hidden, teacher.head), rollouts, self.config)
        return self._objective(rollouts, loss, scores, items, stages, mean_scores(scores, rollouts.response))

    def _from_topk(self, batch: Mapping[str, Tensor], items: float | Tensor | None, stages: Stages) -> Objective:
        """Return the loss of rollouts whose teacher is known by its top-k alone."""
        topk, rest = take_topk(batch)
        rollouts = check_batch(rest)
        self._checks.before_step(self.student, None)
        loss, scores, mass = topk_losses(self.student, rollouts, topk, self.config, stages)
        count = rollouts.response.sum().clamp_min(1)
        means = {
            "student_entropy": scores.student_entropy.sum() / count,
            "teacher_topk_mass": mass.sum() / count,
            "infinite_tokens": loss.isinf().sum(),
        }
        return self._objective(rollouts, loss, scores, items, stages, means)

    def _objective(
        self,
        rollouts: Batch,
        per_token: Tensor,
        scores: TokenScores,
        items: float | Tensor | None,
        stages: Stages,
        means: Mapping[str, Tensor],
    ) -> Objective:
        """Reduce the tokens' losses, and put the step's numbers beside them."""
        loss = reduce_tokens(per_token, rollouts, self.config.reduction, items).loss
        metrics: dict[str, Tensor | float] = {
            "loss": loss,
            "opd_loss": loss,
            "tokens": rollouts.response.sum(),
            "sequence_reduction": float(self.config.reduction == "sequence"),
            **means,
            **stages.seconds,
        }
        return Objective(loss, as_metrics(metrics), scores)
