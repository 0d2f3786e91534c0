"""On-policy distillation: a divergence at every token of the student's own rollouts.

    L = mean over response tokens of KL(p_S(. | x, y_<t) || p_T(. | x, y_<t))

One forward of each model and one `linear_divergence`, which gives the loss and every score; or, where the teacher is known by
its top-k alone, the student's forward and `topd.objectives.topk_teacher`. The teacher may read a prompt of its own before the
same response: `topd.objectives.pairs`.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from topd.checks.rollouts import check_generator
from topd.head import Head
from topd.objectives.aligned import Aligned
from topd.objectives.batch import Batch, check_tokens, open_student
from topd.objectives.config import OPDConfig, config_of
from topd.objectives.inputs import Inputs, check_inputs
from topd.objectives.method import Method, with_whole_teacher
from topd.objectives.metrics import Stages, as_metrics, diagnosed, mean_scores
from topd.objectives.model_checks import ModelChecks
from topd.objectives.objective import Objective
from topd.objectives.observers import observable
from topd.objectives.pairs import demand_pairs, has_pairs
from topd.objectives.reduction import check_items, reduce_tokens
from topd.objectives.token_losses import TokenLosses, token_losses
from topd.objectives.topk_teacher import direction_of, refuse_topk, take_topk, topk_losses


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

    config_type: ClassVar[type[OPDConfig]] = OPDConfig
    demands_pairs: ClassVar[bool] = False  # whether a batch must hold the teacher's side

    def __init__(
        self, student: Any, teacher: Any, config: OPDConfig | None = None, *, allow_unequal_vocabularies: bool = False
    ) -> None:
        self.student, self.teacher, self.config = student, teacher, config_of(config, self.config_type)
        if teacher is None:
            direction_of(self.config)
        elif self.config.topk_support != "tail":
            raise ValueError(
                "config.topk_support is for a teacher known by its top-k, got "
                f"{self.config.topk_support!r} and a teacher model; leave it out, or pass teacher=None"
            )
        self.allow_unequal_vocabularies = allow_unequal_vocabularies
        self._checks, self._aligned = ModelChecks(student, teacher, allow_unequal_vocabularies), Aligned()

    @observable
    @with_whole_teacher
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
                batch: the loss and its gradients are then 0. Or packed, without padding: input_ids [N] int64, cu_seqlens
                [B + 1] int32, from 0 to N, and response_mask [N], False at the first token of each sequence. Without
                a teacher model also teacher_topk_logprobs, floating, nats, at config.temperature, and teacher_topk_ids, int64,
                both [B, T, k] or [N, k]: the teacher's likely tokens in place of the token in that column, -inf for padding.
                Optional, where the teacher reads another prompt before the same response: teacher_input_ids,
                teacher_attention_mask and teacher_response_mask [B, T'], or packed teacher_input_ids and teacher_response_mask
                [M] and teacher_cu_seqlens [B + 1]; the j-th response token of a row is the j-th of the teacher's row
                (`topd.pair` makes such a batch). Optional: token_weights, floating, shaped as input_ids, >= 0, the weight of
                each token's loss, which never enters the denominator and is not read outside the responses; verdict [B] bool,
                whether each response is correct, which changes no loss. No other key.
            num_items: the denominator of a larger batch of which this is a part (gradient accumulation): its response tokens,
                or with reduction "sequence" its responses. None: this batch's own.
            generator: not used; OPD draws nothing.

        Returns:
            Objective; metrics loss, opd_loss, tokens, sequence_reduction (1 or 0), student_entropy, teacher_entropy (means over
            response tokens, nats), student_lost_mass, teacher_lost_mass (likewise: each model's probability of the entries that
            the other does not have), seconds_student_forward, seconds_teacher_forward, seconds_divergence. Diagnostics, of
            every response token alike, whatever it weighs: kl_mean, kl_p50, kl_p95, kl_p99 (percentiles, within 1 %), kl_max,
            of the configured divergence, nats, before position_clip and without hard_weight's term; student_perplexity,
            teacher_perplexity, perplexity_gap (student's minus teacher's). With position_clip: clip_share, the share of tokens
            above it. With verdict: kl_correct, kl_incorrect, the means over the tokens of correct and of other responses, and
            tokens_correct, tokens_incorrect, how many these are. With epistemic_ids: epistemic_mass, the teacher's mean
            probability of these tokens. With teacher_top2: bimodal_share, the share of tokens where the teacher gives the token
            and another one 1/4 each at least, and fragmented_share, the share where its most likely token is the same at the
            next token too, and the response says it neither time. A diagnostic is NaN where no token could be measured. Over
            several micro-batches add up `totals`.

            With a teacher's top-k: no teacher_entropy and no seconds_teacher_forward, but teacher_topk_mass, the mean mass of
            its k tokens, and infinite_tokens, how many have an infinite loss (which passes no gradient). In its scores
            top1_agreement is None, and what a top-k does not say is NaN at response tokens: both KLs, teacher_entropy, both
            lost masses, and teacher_logprob where the token is not among the k; the perplexities are of the other tokens.

        Raises:
            TypeError, ValueError: a wrong type, shape, dtype, device or range; an unknown key; a token that one of the models
                does not have (checked on the CPU); a packed batch and a model that cannot keep its sequences apart; gradients
                that several processes would not exchange; a top-k beside a teacher model, or neither; a teacher's side that is
                not whole, or whose responses are others.
        """
        check_generator(generator)
        items, stages = check_items(num_items), Stages(observer=self.observer)
        if self.teacher is None:
            return self._from_topk(batch, items, stages)
        refuse_topk(batch, type(self).__name__)
        if self.demands_pairs:
            demand_pairs(batch, type(self).__name__)
        inputs = check_inputs(batch)
        self._check_models(inputs)
        student = open_student(self.student, inputs.rollouts)
        with stages.stage("teacher_forward"):
            teacher_states = self._teacher_states(inputs.teacher_batch)
        with stages.stage("student_forward"):
            student_states = inputs.rollouts.hidden(student), student.head
        self.observer.tensor("student_hidden", student_states[0])
        with stages.stage("divergence"):
            teacher_states = teacher_states[0], self._aligned(teacher_states[1], student_states[1])
            losses = token_losses(student_states, teacher_states, inputs, self.config)
        return self._objective(inputs, losses, items, stages, mean_scores(losses.scores, inputs.rollouts.response))

    def _check_models(self, inputs: Inputs) -> None:
        """Check before a step that both models can take it, and have the tokens that they read."""
        self._checks.before_step(self.student, self.teacher)
        if inputs.pairs is None:
            check_tokens(inputs.rollouts, student=self.student, teacher=self.teacher)
        else:
            check_tokens(inputs.rollouts, student=self.student)
            check_tokens(inputs.pairs.teacher, "teacher_", teacher=self.teacher)

    def _teacher_states(self, teacher_batch: Batch) -> tuple[Tensor, Head]:
        """Return the teacher's states over its own batch, [B, T', H] or [M, H], without gradients, and its head. It runs before
        the student, whose activations do not stand beside it then."""
        teacher = teacher_batch.decoder("teacher", self.teacher)
        with torch.no_grad():
            return teacher_batch.hidden(teacher), teacher.head

    def _from_topk(self, batch: Mapping[str, Tensor], items: float | Tensor | None, stages: Stages) -> Objective:
        """Return the loss of rollouts whose teacher is known by its top-k alone."""
        topk, rest = take_topk(batch)
        if has_pairs(batch):
            raise ValueError(
                "batch must hold no teacher's side (teacher_input_ids, ...) where teacher is None, got one: the top-k stands "
                "in the columns of the student's tokens, whatever the teacher read; leave it out"
            )
        inputs = check_inputs(rest)
        self._checks.before_step(self.student, None)
        losses, mass = topk_losses(self.student, inputs, topk, self.config, stages)
        count = inputs.rollouts.response.sum().clamp_min(1)
        means = {
            "student_entropy": losses.scores.student_entropy.sum() / count,
            "teacher_topk_mass": mass.sum() / count,
            "infinite_tokens": losses.unclipped.isinf().sum(),
        }
        return self._objective(inputs, losses, items, stages, means)

    def _objective(
        self,
        inputs: Inputs,
        losses: TokenLosses,
        items: float | Tensor | None,
        stages: Stages,
        means: Mapping[str, Tensor],
    ) -> Objective:
        """Reduce the tokens' losses, and put the step's numbers beside them."""
        rollouts = inputs.rollouts
        loss = reduce_tokens(losses.loss, rollouts, self.config.reduction, items, inputs.token_weights).loss
        totals, diagnostics = diagnosed(losses, inputs, self.config)
        metrics: dict[str, Tensor | float] = {
            "loss": loss,
            "opd_loss": loss,
            "tokens": rollouts.response.sum(),
            "sequence_reduction": float(self.config.reduction == "sequence"),
            **means,
            **diagnostics,
            **stages.seconds,
        }
        return Objective(loss, as_metrics(metrics), losses.scores, totals)
