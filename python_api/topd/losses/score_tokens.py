"""`score_tokens`: what one pass over both models' logits says of each token."""

import torch
from torch import Tensor

from topd.checks.values import check_tensor
from topd.head import Head
from topd.losses.linear_divergence import linear_divergence
from topd.losses.operands import check_head
from topd.scores import TokenScores


def score_tokens(
    student_hidden: Tensor,
    student: Head,
    teacher_hidden: Tensor,
    teacher: Head,
    *,
    tokens: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
) -> TokenScores:
    """Return both KLs, entropies, log-probabilities, agreement and lost mass of each token, in one pass without gradients.

    Args:
        student_hidden, student, teacher_hidden, teacher: as in `linear_divergence`, also sharded; all are detached
            here.
        tokens: [...] int64, the sampled tokens, or None: then the two log-probabilities are None.
        mask: [...] bool; False rows are 0 and False.
        temperature: > 0; governs every score.

    Returns:
        TokenScores of [...] tensors, float32 (float64 if an input is), nats; 2 matrix products.

    Raises:
        TypeError, ValueError: as `linear_divergence`.
    """
    with torch.no_grad():
        _, scores = linear_divergence(
            check_tensor("student_hidden", student_hidden).detach(),
            check_head("student", student).detach(),
            check_tensor("teacher_hidden", teacher_hidden).detach(),
            check_head("teacher", teacher).detach(),
            divergence="forward_kl",
            temperature=temperature,
            mask=mask,
            tokens=tokens,
            return_scores=True,
        )
    return scores
