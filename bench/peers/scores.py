"""Contenders for the scores of tokens, without gradients: forward KL, reverse KL and both entropies, [4, N] in nats."""

import torch
from torch import Tensor

import topd
from bench.cases import Inputs
from bench.peers.floor import floor_of_scores
from topd.ops.shared.plan import FUSED_BLOCK


def eager(inputs: Inputs) -> Tensor:
    """Compute them from full logits."""
    with torch.no_grad():
        s, t = (logits.float().log_softmax(-1) for logits in floor_of_scores(inputs))
        p, q = s.exp(), t.exp()
        return torch.stack([(q * (t - s)).sum(-1), (p * (s - t)).sum(-1), -(p * s).sum(-1), -(q * t).sum(-1)])


def _first_four(scores: topd.TokenScores) -> Tensor:
    return torch.stack([scores.forward_kl, scores.reverse_kl, scores.student_entropy, scores.teacher_entropy])


def ours(inputs: Inputs) -> Tensor:
    """Call topd.score_tokens."""
    student, teacher = topd.Head(inputs.student_weight), topd.Head(inputs.teacher_weight)
    return _first_four(topd.score_tokens(inputs.student_hidden, student, inputs.teacher_hidden, teacher))


def fused(inputs: Inputs) -> Tensor:
    """Compute the same by the fused Triton kernel, which a workspace for few rows asks for."""
    student, teacher = topd.Head(inputs.student_weight.detach()), topd.Head(inputs.teacher_weight)
    few = FUSED_BLOCK * 4 * (inputs.student_weight.shape[0] + inputs.teacher_weight.shape[0])
    sides = (inputs.student_hidden.detach(), student, inputs.teacher_hidden, teacher)
    _, scores = topd.linear_divergence(
        *sides, divergence="forward_kl", return_scores=True, workspace_bytes=few, backend="triton"
    )
    assert isinstance(scores, topd.TokenScores)
    return _first_four(scores)
