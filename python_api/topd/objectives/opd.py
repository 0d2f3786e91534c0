"""On-policy distillation: a divergence at every token of the student's own rollouts.

    L = mean over response tokens of KL(p_S(. | x, y_<t) || p_T(. | x, y_<t))

One forward of each model and one `linear_divergence`, which gives the loss and every score.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from topd.branching.inputs import check_generator
from topd.objectives.config import OPDConfig, config_of
from topd.objectives.model_checks import ModelChecks
from topd.objectives.objective import Objective
from topd.objectives.packed import PACKED_KEYS, check_packed, is_packed, packed_pass, reduce_packed
from topd.objectives.rollouts import (
    KEYS,
    Stages,
    as_metrics,
    check_batch,
    check_items,
    check_keys,
    mean_scores,
    reduce_tokens,
    token_pass,
)


class OPD:
    """The objective.

    Args:
        student: a causal language model of transformers, also inside PEFT; its parameters that require grad are trained. A
            data-parallel wrapper (DDP, FSDP, DeepSpeed) goes around a module whose forward takes this loss, not around the
            student alone: in several processes that is refused, with the module written out. torch.compile goes around the base
            model or its layers.
        teacher: likewise; constant. Put it in eval mode.
        config: OPDConfig; None: its defaults.
        allow_unequal_vocabularies: compare vocabularies whose sizes differ by more than padding (more than 1,024 entries or
            more than 1 % of the larger) on the entries that both have. What each model says beyond them is lost: the metrics
            student_lost_mass and teacher_lost_mass.

    Raises:
        TypeError: config of another type, that of another method too; a model that is none of transformers.
        ValueError: vocabularies that differ by more than padding.

    Source: arXiv 2606.00305, L_OPD.
    """

    def __init__(
        self, student: Any, teacher: Any, config: OPDConfig | None = None, *, allow_unequal_vocabularies: bool = False
    ) -> None:
        self.student, self.teacher, self.config = student, teacher, config_of(config, OPDConfig)
        self._checks = ModelChecks(student, teacher, allow_unequal_vocabularies)

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
                batch: the loss and its gradients are then 0. No other key. Or packed, without padding: input_ids [N] int64,
                cu_seqlens [B + 1] int32, from 0 to N, and response_mask [N], False at the first token of each sequence.
            num_items: the denominator of a larger batch of which this is a part (gradient accumulation): its response tokens,
                or with reduction "sequence" its responses. None: this batch's own.
            generator: not used; OPD draws nothing.

        Returns:
            Objective; metrics loss, opd_loss, tokens, sequence_reduction (1 or 0), student_entropy, teacher_entropy (means over
            response tokens, nats), student_lost_mass, teacher_lost_mass (likewise: each model's probability of the entries that
            the other does not have), seconds_student_forward, seconds_teacher_forward, seconds_divergence.

        Raises:
            TypeError, ValueError: a wrong type, shape, dtype, device or range; an unknown key; a token that one of the models
                does not have (checked on the CPU); a packed batch and a model that cannot keep its sequences apart; gradients
                that several processes would not exchange.
        """
        config, stages = self.config, Stages()
        check_generator(generator)
        items = check_items(num_items)
        if is_packed(batch):
            packed = check_packed(batch)
            check_keys(batch, PACKED_KEYS)
            self._checks.before_step(self.student, self.teacher)
            response = packed.response
            per_token, scores = packed_pass(self.student, self.teacher, packed, config, stages)
            loss = reduce_packed(per_token, packed, config.reduction, items)
        else:
            rollouts = check_batch(batch)
            check_keys(batch, KEYS)
            self._checks.before_step(self.student, self.teacher)
            response = rollouts.response
            found = token_pass(self.student, self.teacher, rollouts, config, stages, cache=False)
            scores = found.scores
            loss = reduce_tokens(found.loss, response, config.reduction, items).loss
        metrics: dict[str, Tensor | float] = {
            "loss": loss,
            "opd_loss": loss,
            "tokens": response.sum(),
            "sequence_reduction": float(config.reduction == "sequence"),
            **mean_scores(scores, response),
            **stages.seconds,
        }
        return Objective(loss, as_metrics(metrics), scores)
