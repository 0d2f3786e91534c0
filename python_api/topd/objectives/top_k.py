"""OPDConfig.top_k: both models on the teacher's k most likely tokens alone, renormalised there.

The teacher's k tokens come from `topk_logprobs` among the vocabulary that both models have; the KLs are `topk_divergence`'s;
the JSD follows the same formulas. Scores are of the whole distributions, from one pass without gradients. Nothing of [N, V].
"""

import math
from typing import Any

import torch
from torch import Tensor

from topd.divergences import JSD, ForwardKL, resolve_divergence
from topd.head import Head
from topd.losses.entry_kl import entries_kl, renormalised, zero_masked
from topd.losses.linear_logprobs import linear_logprobs, logprobs_and_outside
from topd.losses.operands import first_tokens, vocabulary_of
from topd.losses.score_tokens import score_tokens
from topd.losses.topk_divergence import topk_divergence
from topd.losses.topk_logprobs import TopK, topk_logprobs
from topd.objectives.config import OPDConfig
from topd.objectives.rows import Rows
from topd.options import Direction
from topd.scores import TokenScores


def compare_top_k(rows: Rows, student: Head, teacher: Head, k: int, config: OPDConfig) -> tuple[Tensor, TokenScores]:
    """Return the loss [...] of each row on the teacher's k tokens, and its scores on the whole vocabulary; k is at most the
    vocabulary that both models have, and the teacher a constant."""
    vocab = min(vocabulary_of(student), vocabulary_of(teacher))
    if k > vocab:
        raise ValueError(
            f"config.top_k must be at most the {vocab:,} tokens that both models have, got {k}; None compares all of them"
        )
    hidden, options = rows.student_hidden, dict[str, Any](temperature=config.temperature, mask=rows.mask)
    scores = score_tokens(hidden, student, rows.teacher_hidden, teacher, tokens=rows.tokens, **options)
    topk = topk_logprobs(rows.teacher_hidden, first_tokens(teacher, vocab), k, **options)
    student, divergence = first_tokens(student, vocab), resolve_divergence(config.divergence)
    if isinstance(divergence, JSD):
        loss = _jsd(hidden, student, topk, divergence.beta, **options)
    else:
        direction: Direction = "forward" if isinstance(divergence, ForwardKL) else "reverse"
        both = hidden, student, topk.ids, topk.logprobs
        loss = topk_divergence(*both, direction=direction, support="renormalised", **options)
    if config.hard_weight:
        own: Tensor = linear_logprobs(hidden, student, rows.tokens.unsqueeze(-1), weights_hint=rows.hint, **options)
        loss = loss - config.hard_weight * own[..., 0]
    return loss, scores


def _jsd(hidden: Tensor, head: Head, topk: TopK, beta: float, *, temperature: float, mask: Tensor | None) -> Tensor:
    """Return beta KL(p_T || m) + (1 - beta) KL(p_S || m), m = (1 - beta) p_S + beta p_T, of both sides renormalised on the
    teacher's tokens; inf, without a gradient, where the student's mass there is 0: it has no distribution over them."""
    log_t = topk.logprobs.double()
    absent = log_t.isneginf()
    ids = topk.ids.masked_fill(absent, -1)
    options: dict[str, Any] = {"temperature": temperature, "mask": mask, "padded": True, "dense": False}
    logprobs, _, _ = logprobs_and_outside(hidden, head, ids, **options)
    log_s = logprobs.double()
    nowhere = log_s.isneginf().all(-1) & ~absent.all(-1)
    log_t, log_s = renormalised(log_t), renormalised(log_s)
    both = torch.logaddexp(
        log_s.masked_fill(absent, 0.0) + math.log1p(-beta), log_t.masked_fill(absent, 0.0) + math.log(beta)
    ).masked_fill(absent, -torch.inf)
    value = beta * entries_kl(log_t, both) + (1 - beta) * entries_kl(log_s, both)
    return zero_masked(value.masked_fill(nowhere, torch.inf), mask, logprobs.dtype)
