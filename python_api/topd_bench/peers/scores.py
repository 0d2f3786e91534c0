"""Contenders for the scores of tokens, without gradients: forward KL, reverse KL and both entropies, [4, N] in nats."""

import torch
from torch import Tensor

import topd
from topd_bench.cases import Inputs
from topd_bench.peers.floor import floor_of_scores


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
