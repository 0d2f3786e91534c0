"""KLs to a few tokens of each row, composed on `linear_logprobs`: soft targets, and teachers known by their top-k.

A row's few numbers are computed in float64. A KL here is a sum of non-negative terms, p (log p - log q) - p + q, over the
chosen tokens and, where it is due, one more bucket with the mass outside them: near equality the errors of the
log-probabilities then count only to second order, and no value is negative.
"""

from typing import get_args

import torch
from torch import Tensor

from topd.checks.values import choice, flag, floating, on_device, shaped
from topd.head import Head
from topd.losses.linear_logprobs import TOPK_ORDER, check_ids, logprobs_and_outside
from topd.losses.operands import check_side, per_token
from topd.ops.shared.repeats import runs_of
from topd.ops.shared.row_math import phi
from topd.options import BackendName, Direction, Support

SUM_TOLERANCE = 1e-3
DIRECTIONS: tuple[str, ...] = get_args(Direction)
SUPPORTS: tuple[str, ...] = get_args(Support)


def checks_values(where: Tensor) -> bool:
    """Values are checked on the CPU alone, and not inside torch.compile: elsewhere the check would stall or break it."""
    return where.device.type == "cpu" and not torch.compiler.is_compiling()


def _like_ids(name: str, value: object, ids: Tensor) -> Tensor:
    checked = floating(name, value)
    shaped(name, checked, tuple(ids.shape), "an entry for each id")
    on_device(name, checked, ids.device, "the ids")
    if checked.requires_grad:
        raise ValueError(f"{name} must not require grad: the teacher is a constant; pass {name}.detach()")
    return checked


def _first_bad(bad: Tensor, *, of: Tensor) -> str:
    """The value at the first bad place, and where that is."""
    at = tuple(bad.nonzero()[0].tolist())
    return f"{of[at].item():.6g} at index {list(at)}"


def _log_ratio(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """log p - log q, 0 where either is -inf, and where p > 0 = q. No gradient at either."""
    absent = log_p.isneginf() | log_q.isneginf()
    return (log_p.masked_fill(absent, 0.0) - log_q.masked_fill(absent, 0.0)), ~log_p.isneginf() & log_q.isneginf()


def _entries_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum of p (log p - log q) - p + q, no term of which is negative; entries may be -inf: p = 0 gives q, q = 0 < p makes the
    row inf, without a gradient."""
    p, q = log_p.exp(), log_q.exp()
    d, impossible = _log_ratio(log_p, log_q)
    close = (d.abs() <= 1) & ~(log_p.isneginf() | log_q.isneginf())
    terms = torch.where(close, p * phi(d.masked_fill(~close, 0.0)), p * d - p + q)
    return _sum(terms, impossible)


def _plain_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum of p (log p - log q), of either sign where p and q hold different mass."""
    d, impossible = _log_ratio(log_p, log_q)
    return _sum(log_p.exp() * d, impossible)


def _sum(terms: Tensor, impossible: Tensor) -> Tensor:
    infinite = impossible.any(-1)
    return terms.masked_fill(infinite.unsqueeze(-1), 0.0).sum(-1).masked_fill(infinite, torch.inf)


def _finish(value: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    value = value.to(dtype)
    return value if mask is None else value.masked_fill(~mask, 0.0)


def _merged(ids: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
    """Each id once a row: repeats give their probability to the first; entries of probability 0 get the id -1."""
    runs = runs_of(ids)
    total = runs.totals(probs)
    each = torch.full_like(ids, -1).scatter(-1, runs.run, runs.ordered)
    return each.masked_fill(total == 0, -1), total


def _with_bucket(logs: Tensor, last: Tensor) -> Tensor:
    """One more entry a row."""
    return torch.cat([logs, last.unsqueeze(-1)], -1)


def check_ids_in_vocabulary(name: str, ids: Tensor, counts: Tensor, vocab: int) -> None:
    if (bad := counts & ((ids < 0) | (ids >= vocab))).any():
        raise ValueError(
            f"{name} must lie in [0, {vocab}), the rows of head.weight, where the row is unmasked and the probability is not "
            f"0, got {_first_bad(bad, of=ids)}"
        )


def soft_target_kl(
    hidden: Tensor,
    head: Head,
    target_ids: Tensor,
    target_probs: Tensor,
    *,
    normalize: bool = False,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weights_hint: Tensor | None = None,
    workspace_bytes: int | None = None,
    backend: BackendName | None = None,
) -> Tensor:
    """KL(q || p_S) of a target distribution q over a few tokens of each row, from hidden states; see `linear_logprobs`.

    Computed as the sum of q log(q / p_S) - q + p_S: the same where q sums to 1, never negative where its sum is a little off.

    Args:
        hidden: [..., H] floating, dtype of `head.weight`; differentiated.
        head: the student's Head.
        target_ids: [..., M] int64; repeats are one token, their probabilities add up before any entropy is taken.
        target_probs: [..., M] floating, >= 0, constant. The rows sum to 1 within 1e-3. An entry of 0 is padding: its id is
            never read.
        normalize: divide each row by its sum (which must be > 0) instead of asking for 1.
        temperature: > 0, of the student.
        mask: [...] bool; False rows are exactly 0, cost nothing and are not checked.
        weights_hint: [...] what the result will be multiplied by, up to one factor: speed alone.
        workspace_bytes, backend: as in `linear_logprobs`.

    Returns:
        [...] float32 (float64 for float64), nats; 3 matrix products (2 with a frozen head).

    Raises:
        TypeError, ValueError: a wrong type, shape, dtype, range or option; target rows that do not sum to 1. Values are
            checked on the CPU; on a GPU, or inside torch.compile, an id outside the vocabulary has probability 0 and the sums
            are taken as they are.
    """
    check_side("hidden", hidden, "head", head)
    check_ids("target_ids", target_ids, hidden)
    flag("normalize", normalize)
    probs = _like_ids("target_probs", target_probs, target_ids).double()
    if mask is not None:
        per_token("mask", mask, torch.bool, hidden, "hidden")
        probs = probs.masked_fill(~mask.unsqueeze(-1), 0.0)
    total = probs.sum(-1)
    if checks_values(hidden):
        check_targets("target_probs", probs, mask, normalize=normalize)
        check_ids_in_vocabulary("target_ids", target_ids, probs != 0, head.weight.shape[0])
    if normalize:
        probs = probs / total.masked_fill(total == 0, 1.0).unsqueeze(-1)
    ids, merged = _merged(target_ids.masked_fill(probs == 0, -1), probs)
    logprobs, _, outside = logprobs_and_outside(
        hidden,
        head,
        ids,
        temperature=temperature,
        mask=mask,
        weights_hint=weights_hint,
        workspace_bytes=workspace_bytes,
        backend=backend,
        padded=True,
    )
    nothing = torch.full_like(total, -torch.inf)
    value = _entries_kl(_with_bucket(merged.log(), nothing), _with_bucket(logprobs.double(), outside.double()))
    return _finish(value, mask, logprobs.dtype)


def check_targets(name: str, probs: Tensor, mask: Tensor | None, *, normalize: bool) -> None:
    """Rows of probabilities, 0 where masked."""
    total = probs.sum(-1)
    if (bad := ~(probs >= 0) | probs.isinf()).any():
        raise ValueError(f"{name} must be finite and >= 0, got {_first_bad(bad, of=probs)}")
    counts = torch.ones_like(total, dtype=torch.bool) if mask is None else mask
    if normalize and (bad := counts & (total == 0)).any():
        raise ValueError(f"{name} must have a sum > 0 in each row to be normalised, got {_first_bad(bad, of=total)}")
    if not normalize and (bad := counts & ~((total - 1).abs() <= SUM_TOLERANCE)).any():
        raise ValueError(
            f"{name} must sum to 1 within {SUM_TOLERANCE:g} in each row, got {_first_bad(bad, of=total)}; pass "
            "normalize=True to divide by the sum, or mask such rows out"
        )


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
    """A KL between the student and a teacher of whom only the k most likely tokens are known, as a server returns them.

    Args:
        hidden: [..., H] floating, dtype of `head.weight`; differentiated.
        head: the student's Head.
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
    check_side("hidden", hidden, "head", head)
    check_ids("teacher_ids", teacher_ids, hidden)
    choice("direction", direction, DIRECTIONS)
    choice("support", support, SUPPORTS)
    vocab, k = head.weight.shape[0], teacher_ids.shape[-1]
    if k > vocab:
        raise ValueError(f"teacher_ids must hold at most the head's {vocab} tokens in a row, got k = {k}")
    if isinstance(teacher_logprobs, Tensor) and teacher_logprobs.dtype == torch.int64:
        raise TypeError(f"teacher_logprobs must be float32, float64, bfloat16 or float16, got torch.int64; {TOPK_ORDER}")
    log_t = _like_ids("teacher_logprobs", teacher_logprobs, teacher_ids).double()
    if weights_hint is not None:
        per_token("weights_hint", weights_hint, None, hidden, "hidden")
    if mask is not None:
        per_token("mask", mask, torch.bool, hidden, "hidden")
        log_t = log_t.masked_fill(~mask.unsqueeze(-1), -torch.inf)
    if checks_values(hidden):
        check_ids_in_vocabulary("teacher_ids", teacher_ids, ~log_t.isneginf(), vocab)
        check_topk_values("teacher_ids", teacher_ids, "teacher_logprobs", log_t)
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
        log_t, log_s = _renormalised(log_t), _renormalised(log_s)
    elif support == "tail":
        log_t, log_s = _with_bucket(log_t, _log_tail(log_t, vocab)), _with_bucket(log_s, outside.double())
    log_p, log_q = (log_t, log_s) if direction == "forward" else (log_s, log_t)
    value = _plain_kl(log_p, log_q) if support == "raw" else _entries_kl(log_p, log_q)
    if support == "renormalised":
        value = value.masked_fill(nowhere, torch.inf)
    return _finish(value, mask, logprobs.dtype)


def _renormalised(logprobs: Tensor) -> Tensor:
    """log-probabilities of the chosen tokens alone; a row without any stays -inf."""
    nothing = logprobs.isneginf().all(-1, keepdim=True)
    return (logprobs - logprobs.masked_fill(nothing, 0.0).logsumexp(-1, keepdim=True)).masked_fill(nothing, -torch.inf)


def _log_tail(logprobs: Tensor, vocab: int) -> Tensor:
    """log(1 - sum of exp), clamped at log 0, and log 0 where the row holds the whole vocabulary. 1 - the largest probability is
    -expm1 of its logarithm."""
    if logprobs.shape[-1] == 0:
        return logprobs.new_zeros(logprobs.shape[:-1])
    top, at = logprobs.max(-1, keepdim=True)
    others = logprobs.scatter(-1, at, -torch.inf).exp().sum(-1)
    whole = (~logprobs.isneginf()).sum(-1) == vocab
    return (-top[..., 0].expm1() - others).clamp_min(0.0).masked_fill(whole, 0.0).log()


def check_topk_values(ids_name: str, ids: Tensor, logprobs_name: str, logprobs: Tensor) -> None:
    """Rows of a top-k, -inf where masked: no NaN, no more mass than 1, no token twice."""
    if (bad := logprobs.isnan()).any():
        raise ValueError(f"{logprobs_name} must not be NaN, got {_first_bad(bad, of=logprobs)}")
    mass = logprobs.exp().sum(-1)
    if (bad := mass > 1 + SUM_TOLERANCE).any():
        raise ValueError(
            f"{logprobs_name} must be log-probabilities whose exponentials sum to at most 1 + {SUM_TOLERANCE:g} in each "
            f"row, got "
            f"{_first_bad(bad, of=mass)}; are they logits?"
        )
    padding = logprobs.isneginf()
    if (bad := ~runs_of(ids.masked_fill(padding, -1)).first() & ~padding).any():
        raise ValueError(f"{ids_name} must be distinct in each row, got a repeated {_first_bad(bad, of=ids)}")
