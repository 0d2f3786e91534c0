"""Entropy-aware on-policy distillation, composed on both primitives."""

from typing import Any

import torch
from torch import Tensor

from topd.checks.values import check_range, positive_int, real
from topd.head import Head
from topd.losses.linear_divergence import linear_divergence
from topd.losses.operands import autocast, cast, check_side, first_tokens, vocabulary_of
from topd.losses.sharding import passed_together
from topd.losses.soft_targets import soft_target_kl
from topd.losses.topk_logprobs import topk_logprobs
from topd.options import BackendName
from topd.scores import TokenScores


def entropy_aware_opd(
    student_hidden: Tensor,
    student: Head,
    teacher_hidden: Tensor,
    teacher: Head,
    *,
    top_k: int = 16,
    entropy_threshold: float = 0.8,
    coef: float = 1.0,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weights_hint: Tensor | None = None,
    workspace_bytes: int | None = None,
    backend: BackendName | None = None,
) -> Tensor:
    """Return the reverse KL, and where the teacher is undecided also the forward KL to its most likely tokens.

    KL(p_S || p_T) + coef 1[H(p_T) >= entropy_threshold] KL(top-k of p_T, renormalised || p_S).

    Args:
        student_hidden, student, teacher_hidden, teacher: as in `linear_divergence`.
        top_k: tokens of the teacher, at most the smaller vocabulary.
        entropy_threshold: nats, >= 0.
        coef: >= 0, the weight of the forward KL.
        temperature: > 0, of both sides, their entropies and top-k included.
        mask: [...] bool; False rows are exactly 0 and cost nothing.
        weights_hint, workspace_bytes, backend: as in `linear_divergence`.

    Returns:
        [...] float32 (float64 if an input is), nats; the cost of `linear_divergence`, and 4 matrix products more for the rows
        over the threshold.

    Raises:
        TypeError, ValueError: as `linear_divergence`.
    """
    with passed_together(student, teacher):
        check_side("student_hidden", student_hidden, "student", student, may_be_sharded=True)
        check_side("teacher_hidden", teacher_hidden, "teacher", teacher, may_be_sharded=True)
        vocab = min(vocabulary_of(student), vocabulary_of(teacher))
        if positive_int("top_k", top_k) > vocab:
            raise ValueError(f"top_k must be at most the common vocabulary's {vocab} entries, got {top_k}")
        real("entropy_threshold", entropy_threshold, low=0.0)
        real("coef", coef, low=0.0)
        dtype = torch.promote_types(torch.promote_types(student_hidden.dtype, teacher_hidden.dtype), torch.float32)
        check_range("coef", coef, dtype)
    sides = (student_hidden, student, teacher_hidden, teacher)
    options: dict[str, Any] = {"temperature": temperature, "workspace_bytes": workspace_bytes}
    trained = options | {"weights_hint": weights_hint, "backend": backend}
    pair: tuple[Tensor, TokenScores] = linear_divergence(
        *sides, divergence="reverse_kl", mask=mask, return_scores=True, **trained
    )
    value, scores = pair
    if coef == 0:
        return value
    undecided = scores.teacher_entropy >= entropy_threshold
    if mask is not None:
        undecided = undecided & mask
    if dtype == torch.float64:  # one side of fewer digits: the top-k's part is computed as the reverse KL's is
        student_hidden, student = cast(*autocast(student_hidden, student), dtype)
        teacher_hidden, teacher = cast(*autocast(teacher_hidden, teacher), dtype)
    logprobs, ids = topk_logprobs(teacher_hidden, first_tokens(teacher, vocab), top_k, mask=undecided, **options)
    guidance: Tensor = soft_target_kl(
        student_hidden, first_tokens(student, vocab), ids, logprobs.exp(), normalize=True, mask=undecided, **trained
    )
    return value + coef * guidance
