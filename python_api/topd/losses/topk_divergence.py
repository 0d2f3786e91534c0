"""`topk_divergence`: a KL to a teacher of whom only the most likely tokens are known."""

from typing import get_args

import torch
from torch import Tensor

from topd.checks.distributions import check_ids_in_vocabulary, check_like_ids, check_topk_values, checks_values
from topd.checks.tokens import TOPK_ORDER, check_chosen_ids
from topd.checks.values import FLOATING, choice, per_token
from topd.head import Head
from topd.losses.entry_kl import entries_kl, plain_kl, renormalised, with_bucket, zero_masked
from topd.losses.linear_logprobs import logprobs_and_outside
from topd.losses.operands import check_side, vocabulary_of
from topd.losses.sharding import passed_together
from topd.options import BackendName, Direction, Support

DIRECTIONS: tuple[str, ...] = get_args(Direction)
SUPPORTS: tuple[str, ...] = get_args(Support)


def topk_divergence(
    hidden: Tensor,
    head: Head,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    *,
    direction: Direction = "forward",
    support: Support = "tail",
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weights_hint: Tensor | None = None,
    workspace_bytes: int | None = None,
    backend: BackendName | None = None,
) -> Tensor:
    """Return a KL between the student and a teacher of whom only the k most likely tokens are known.

    Servers return such a top-k; `topk_logprobs` makes it of a model, `pad_topk` of a server's answers. Composed on
    `linear_logprobs`.

    Args:
        hidden: [..., H] floating, dtype of `head.weight`; differentiated.
        head: the student's Head, also sharded, as in `linear_logprobs`.
        teacher_ids: [..., k] int64, distinct in each row, k <= V.
        teacher_logprobs: [..., k] floating, nats, constant; a row's probabilities sum to at most 1 + 1e-3. -inf is padding:
            its id is never read.
        direction: "forward", KL(p_T || p_S), or "reverse", KL(p_S || p_T).
        support: "tail": one more bucket holds the rest of each side's mass; "renormalised": both sides divided by their mass on
            the k tokens; "raw": neither, the plain sum over the k tokens, which may be negative.
        temperature: > 0, of the student; the teacher's log-probabilities are taken as they are.
        mask: [...] bool; False rows are exactly 0, cost nothing and are not checked.
        weights_hint: [...] what the result will be multiplied by, up to one factor: speed alone, and only with "raw",
            "forward".
        workspace_bytes, backend: as in `linear_logprobs`.

    Returns:
        [...] float32 (float64 for float64), nats. Where the teacher's k tokens hold all of its mass, its tail is 0 and the
        reverse KL with "tail" is inf (without a gradient), unless the student's tail is 0 too. "renormalised" is inf (without
        a gradient) in both directions where the student's mass on the k tokens is 0: it has no distribution over them.

    Raises:
        TypeError, ValueError: a wrong type, shape, dtype, range or option; repeated ids, too much mass. Values are checked on
            the CPU; on a GPU, or inside torch.compile, an id outside the vocabulary has probability 0, a repeated one counts
            twice, and mass beyond 1 leaves a tail of 0.
    """
    with passed_together(head):
        check_side("hidden", hidden, "head", head, may_be_sharded=True)
        check_chosen_ids("teacher_ids", teacher_ids, hidden)
        choice("direction", direction, DIRECTIONS)
        choice("support", support, SUPPORTS)
        vocab = vocabulary_of(head)
        log_t = _checked_logprobs(teacher_logprobs, teacher_ids, hidden, mask, vocab)
        if weights_hint is not None:
            per_token("weights_hint", weights_hint, FLOATING, hidden, "hidden")
    ids = teacher_ids.masked_fill(log_t.isneginf(), -1)
    raw_forward = support == "raw" and direction == "forward"
    if raw_forward:  # each row's upstream gradients add up to minus the teacher's mass
        mass = log_t.exp().sum(-1)
        weights_hint = mass if weights_hint is None else weights_hint.double() * mass
    logprobs, _, outside = logprobs_and_outside(
        hidden,
        head,
        ids,
        temperature=temperature,
        mask=mask,
        weights_hint=weights_hint if raw_forward else None,
        workspace_bytes=workspace_bytes,
        backend=backend,
        padded=True,
        dense=raw_forward,
    )
    log_s = logprobs.double()
    if support == "renormalised":
        nowhere = log_s.isneginf().all(-1) & ~log_t.isneginf().all(-1)
        log_t, log_s = renormalised(log_t), renormalised(log_s)
    elif support == "tail":
        log_t, log_s = with_bucket(log_t, _log_tail(log_t, vocab)), with_bucket(log_s, outside.double())
    log_p, log_q = (log_t, log_s) if direction == "forward" else (log_s, log_t)
    value = plain_kl(log_p, log_q) if support == "raw" else entries_kl(log_p, log_q)
    if support == "renormalised":
        value = value.masked_fill(nowhere, torch.inf)
    return zero_masked(value, mask, logprobs.dtype)


def _checked_logprobs(teacher_logprobs: object, ids: Tensor, hidden: Tensor, mask: Tensor | None, vocab: int) -> Tensor:
    """Return the teacher's log-probabilities [..., k] float64, checked, -inf where masked."""
    if ids.shape[-1] > vocab:
        raise ValueError(f"teacher_ids must hold at most the head's {vocab} tokens in a row, got k = {ids.shape[-1]}")
    if isinstance(teacher_logprobs, Tensor) and teacher_logprobs.dtype == torch.int64:
        raise TypeError(f"teacher_logprobs must be float32, float64, bfloat16 or float16, got torch.int64; {TOPK_ORDER}")
    logprobs = check_like_ids("teacher_logprobs", teacher_logprobs, ids).double()
    if mask is not None:
        per_token("mask", mask, torch.bool, hidden, "hidden")
        logprobs = logprobs.masked_fill(~mask.unsqueeze(-1), -torch.inf)
    if checks_values(hidden):
        check_ids_in_vocabulary("teacher_ids", ids, ~logprobs.isneginf(), vocab)
        check_topk_values("teacher_ids", ids, "teacher_logprobs", logprobs)
    return logprobs


def _log_tail(logprobs: Tensor, vocab: int) -> Tensor:
    """Return log(1 - sum of exp) of each row, at least log 0, and log 0 where the row holds the whole vocabulary. 1 minus the
    largest probability is -expm1 of its logarithm."""
    if logprobs.shape[-1] == 0:
        return logprobs.new_zeros(logprobs.shape[:-1])
    top, index = logprobs.max(-1, keepdim=True)
    others = logprobs.scatter(-1, index, -torch.inf).exp().sum(-1)
    whole = (~logprobs.isneginf()).sum(-1) == vocab
    return (-top[..., 0].expm1() - others).clamp_min(0.0).masked_fill(whole, 0.0).log()
