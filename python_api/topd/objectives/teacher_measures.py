"""What diagnostics ask of the teacher's distributions beside the scores, where a configuration wants them: epistemic_ids and
teacher_top2. Each costs one product of the teacher's states and head, in chunks: nothing of [N, V].
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from topd.head import Head
from topd.losses.linear_logprobs import linear_logprobs
from topd.losses.operands import first_tokens, vocabulary_of
from topd.losses.topk_logprobs import topk_logprobs
from topd.objectives.config import OPDConfig
from topd.objectives.diagnostics import TeacherTop2
from topd.objectives.rows import Rows


class TeacherMeasures(NamedTuple):
    """What was measured of the teacher in place of each token, [B, T] or [N]; None: not asked for.

    Attributes:
        epistemic_mass: its probability of the tokens of epistemic_ids.
        top2: its two most likely tokens, with teacher_top2.
    """

    epistemic_mass: Tensor | None = None
    top2: TeacherTop2 | None = None


@torch.no_grad()
def teacher_measures(rows: Rows, student: Head, teacher: Head, config: OPDConfig) -> TeacherMeasures:
    """Measure the teacher's distributions over the vocabulary that both models have, at the configuration's temperature."""
    vocab = min(vocabulary_of(student), vocabulary_of(teacher))
    hidden, turn = rows.teacher_hidden, rows.by_token
    options: dict[str, Any] = {"temperature": config.temperature, "mask": rows.mask}
    mass, top2 = None, None
    if config.epistemic_ids is not None:
        if max(config.epistemic_ids) >= vocab:
            raise ValueError(
                f"config.epistemic_ids must be among the {vocab:,} tokens that both models have, got "
                f"{max(config.epistemic_ids)}; take topd.trd.epistemic_ids of their tokenizer"
            )
        ids = torch.tensor(config.epistemic_ids).to(hidden.device, non_blocking=True)
        logprobs: Tensor = linear_logprobs(hidden, first_tokens(teacher, vocab), ids.expand(*rows.tokens.shape, -1), **options)
        mass = turn(logprobs.exp().sum(-1))
    if config.teacher_top2:
        topk = topk_logprobs(hidden, first_tokens(teacher, vocab), 2, **options)
        top2 = TeacherTop2(*(torch.stack([turn(each) for each in part.unbind(-1)], dim=-1) for part in topk))
    return TeacherMeasures(mass, top2)
