"""Trajectory-refined distillation: OPD's machinery on refined responses, where the teacher also reads what was refined.

    L = mean over the tokens of y_r of KL(p_T(. | refine_prompt(x, y_o), y_r,<t) || p_S(. | x, y_r,<t))

The student's rollout y_o was refined to y_r by the teacher (`topd.trd.pipeline`). Which response a batch holds and what the
teacher reads before it belong to the data; here are the loss, and the demand that the teacher reads something of its own.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from topd.objectives.config import TRDConfig
from topd.objectives.objective import Objective
from topd.objectives.opd import OPD
from topd.objectives.pairs import demand_pairs
from topd.objectives.topk_teacher import refuse_topk


class TRD(OPD):
    """Trajectory-refined distillation: the loss of responses before which the teacher reads another prompt.

    Args:
        student, teacher: as of `OPD`; the teacher is a model.
        config: TRDConfig; None: its defaults, the forward KL over the full vocabulary.
        allow_unequal_vocabularies: as of `OPD`.

    Raises:
        TypeError: config of another type, that of another method too; a model that is none of transformers.
        ValueError: no teacher; vocabularies that differ by more than padding.

    Source: arXiv 2606.08432, eq. 6.
    """

    config_type = TRDConfig

    def __init__(
        self, student: Any, teacher: Any, config: TRDConfig | None = None, *, allow_unequal_vocabularies: bool = False
    ) -> None:
        if teacher is None:
            raise ValueError(
                "teacher must be a model, which reads a prompt of its own, got None; a teacher of whom only the top-k is known "
                'serves topd.OPD(student, None, topd.OPDConfig("forward_kl")); one model that teaches itself, topd.OPSD'
            )
        super().__init__(student, teacher, config, allow_unequal_vocabularies=allow_unequal_vocabularies)

    def __call__(
        self,
        batch: Mapping[str, Tensor],
        *,
        num_items: float | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Objective:
        """Return the loss of a batch of refined responses.

        Args:
            batch: as of `OPD`, with the teacher's side, which is optional there: input_ids, attention_mask and response_mask
                [B, T], teacher_input_ids, teacher_attention_mask and teacher_response_mask [B, T'], or both packed; optional
                token_weights and verdict. `topd.pair` makes it of lists of ids.
            num_items, generator: as of `OPD`.

        Returns:
            Objective, with the metrics of `OPD`; its scores are in the student's columns.

        Raises:
            TypeError, ValueError: as `OPD`; a key of the teacher's side that is missing.
        """
        refuse_topk(batch, "TRD")
        demand_pairs(batch, "TRD")
        return super().__call__(batch, num_items=num_items, generator=generator)
