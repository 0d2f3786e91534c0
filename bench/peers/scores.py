"""Contenders for the scores of tokens, without gradients: forward KL, reverse KL and both entropies, [4, N] in nats."""

import math

import torch
from torch import Tensor

import topd
from bench.cases import Inputs
from bench.peers.floor import floor_of_scores
from topd.ops.linear_divergence.spec import RowSpec
from topd.ops.score_tokens.op import run_scores
from topd.ops.shared.engines import TRITON
from topd.ops.shared.tiles import Side
from topd.scores import FIELDS


def eager(inputs: Inputs) -> Tensor:
    """Compute them from full logits."""
    with torch.no_grad():
        s, t = (logits.float().log_softmax(-1) for logits in floor_of_scores(inputs))
        p, q = s.exp(), t.exp()
        return torch.stack([(q * (t - s)).sum(-1), (p * (s - t)).sum(-1), -(p * s).sum(-1), -(q * t).sum(-1)])


_FIRST_FOUR = ("forward_kl", "reverse_kl", "student_entropy", "teacher_entropy")


def ours(inputs: Inputs) -> Tensor:
    """Call topd.score_tokens."""
    student, teacher = topd.Head(inputs.student_weight), topd.Head(inputs.teacher_weight)
    scores = topd.score_tokens(inputs.student_hidden, student, inputs.teacher_hidden, teacher)
    return torch.stack([getattr(scores, name) for name in _FIRST_FOUR])


def fused(inputs: Inputs) -> Tensor:
    """Compute the same by the fused Triton kernel, which no public function chooses."""
    student, teacher = (
        Side(hidden.detach(), weight.detach(), None, None, None, 1.0)
        for hidden, weight in (
            (inputs.student_hidden, inputs.student_weight),
            (inputs.teacher_hidden, inputs.teacher_weight),
        )
    )
    spec = RowSpec(1.0, None, 1.0, None, 1.0, "forward_kl", math.inf, 0.0)
    table = run_scores(TRITON.kernel("score_tokens", student.hidden.device), student, teacher, None, spec)
    return table[[FIELDS.index(name) for name in _FIRST_FOUR]]
