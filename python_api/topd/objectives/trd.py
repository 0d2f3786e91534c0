"""Trajectory-refined distillation: OPD's machinery on refined responses, where the teacher also reads what was refined.

    L = mean over the tokens of y_r of KL(p_T(. | refine_prompt(x, y_o), y_r,<t) || p_S(. | x, y_r,<t))

The student's rollout y_o was refined to y_r by the teacher (`topd.trd.pipeline`). Which response a batch holds and what the
teacher reads before it belong to the data; here are the loss, and the demand that the teacher reads something of its own.
"""

from typing import Any

from topd.objectives.config import TRDConfig
from topd.objectives.opd import OPD


class TRD(OPD):
    """Trajectory-refined distillation: the loss of responses before which the teacher reads another prompt.

    Batches are those of `OPD`, and must hold the teacher's side, which is optional there: teacher_input_ids,
    teacher_attention_mask and teacher_response_mask, or both sides packed. `topd.pair` makes them of lists of ids.

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
    demands_pairs = True

    def __init__(
        self, student: Any, teacher: Any, config: TRDConfig | None = None, *, allow_unequal_vocabularies: bool = False
    ) -> None:
        if teacher is None:
            raise ValueError(
                "teacher must be a model, which reads a prompt of its own, got None; a teacher of whom only the top-k is known "
                'serves topd.OPD(student, None, topd.OPDConfig("forward_kl")); one model that teaches itself, topd.OPSD'
            )
        super().__init__(student, teacher, config, allow_unequal_vocabularies=allow_unequal_vocabularies)
