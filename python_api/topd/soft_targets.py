"""KLs to a few tokens of each row, composed on `linear_logprobs`: soft targets, and teachers known by their top-k.

A row's few numbers are computed in float64. A KL here is a sum of non-negative terms, p (log p - log q) - p + q, over the
chosen tokens and, where it is due, one more bucket with the mass outside them: near equality the errors of the
log-probabilities then count only to second order, and no value is negative.
"""

import torch
from torch import Tensor

from topd.arguments import check_side, per_token
from topd.checks import choice, flag, floating, on_device, shaped
from topd.head import Head
from topd.logprobs import check_ids, logprobs_and_outside
from topd.row_math import phi

SUM_TOLERANCE = 1e-3
DIRECTIONS = ("forward", "reverse")
SUPPORTS = ("raw", "renormalised", "tail")


def _checks_values(where: Tensor) -> bool:
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


def _entries_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Non-negative terms p (log p - log q) - p + q; entries may be -inf: p = 0 gives q, q = 0 < p gives inf, both 0 give 0.
    Differentiable where it is finite."""
    p, q = log_p.exp(), log_q.exp()
    impossible = ~log_p.isneginf() & log_q.isneginf()
    d = (log_p.masked_fill(log_p.isneginf(), 0.0) - log_q.masked_fill(log_q.isneginf(), 0.0)).masked_fill(impossible, 0.0)
    absent = log_p.isneginf() | log_q.isneginf()
    d = d.masked_fill(absent, 0.0)
    close = d.abs() <= 1
    near = p * phi(d.masked_fill(~close, 0.0))
    terms = torch.where(close & ~absent, near, p * d - p + q)
    return terms.masked_fill(impossible, torch.inf)


def _sum(terms: Tensor) -> Tensor:
    """Over the last dimension; a row with an infinite term is inf and has no gradient."""
    infinite = terms.isinf()
    return terms.masked_fill(infinite.any(-1, keepdim=True), 0.0).sum(-1).masked_fill(infinite.any(-1), torch.inf)


def _finish(value: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    value = value.to(dtype)
    return value if mask is None else value.masked_fill(~mask, 0.0)


def _merged(ids: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
    """Each id once a row: repeats give their probability to the first; entries of probability 0 get the id -1."""
    ordered, order = ids.sort(dim=-1, stable=True)
    starts = torch.ones_like(ordered, dtype=torch.bool)
    starts[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    run = starts.cumsum(-1) - 1
    total = torch.zeros_like(probs).scatter_add(-1, run, probs.gather(-1, order))
    each = torch.full_like(ids, -1).scatter(-1, run, ordered)
    return each.masked_fill(total == 0, -1), total


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
    backend: str | None = None,
) -> Tensor:
    """KL(q || p_S) of a target distribution q over a few tokens of each row, from hidden states; see `linear_logprobs`.

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
    if _checks_values(hidden):
        _check_targets(probs, total, mask, normalize=normalize)
    if normalize:
        probs = probs / total.masked_fill(total == 0, 1.0).unsqueeze(-1)
        total = (total != 0).to(total.dtype)
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
    value = _sum(_entries_kl(merged.log(), logprobs.double())) + outside.double().exp() + (total - 1)
    return _finish(value, mask, logprobs.dtype)


def _check_targets(probs: Tensor, total: Tensor, mask: Tensor | None, *, normalize: bool) -> None:
    if (bad := ~(probs >= 0) | probs.isinf()).any():
        raise ValueError(f"target_probs must be finite and >= 0, got {_first_bad(bad, of=probs)}")
    counts = torch.ones_like(total, dtype=torch.bool) if mask is None else mask
    if normalize and (bad := counts & (total == 0)).any():
        raise ValueError(f"target_probs must have a sum > 0 in each row to be normalised, got {_first_bad(bad, of=total)}")
    if not normalize and (bad := counts & ~((total - 1).abs() <= SUM_TOLERANCE)).any():
        raise ValueError(
            f"target_probs must sum to 1 within {SUM_TOLERANCE:g} in each row, got {_first_bad(bad, of=total)}; pass "
            "normalize=True to divide by the sum, or mask such rows out"
        )


def topk_divergence(
    hidden: Tensor,
    head: Head,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    *,
    direction: str = "forward",
    support: str = "tail",
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weights_hint: Tensor | None = None,
    workspace_bytes: int | None = None,
    backend: str | None = None,
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
        reverse KL with "tail" is inf (without a gradient), unless the student's tail is 0 too.

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
    log_t = _like_ids("teacher_logprobs", teacher_logprobs, teacher_ids).double()
    if mask is not None:
        per_token("mask", mask, torch.bool, hidden, "hidden")
        log_t = log_t.masked_fill(~mask.unsqueeze(-1), -torch.inf)
    ids = teacher_ids.masked_fill(log_t.isneginf(), -1)
    if _checks_values(hidden):
        _check_topk(ids, log_t)
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
        log_t, log_s = _renormalised(log_t), _renormalised(log_s)
    elif support == "tail" and k < vocab:
        log_t = torch.cat([log_t, _log_tail(log_t).unsqueeze(-1)], -1)
        log_s = torch.cat([log_s, outside.double().unsqueeze(-1)], -1)
    log_p, log_q = (log_t, log_s) if direction == "forward" else (log_s, log_t)
    value = _sum(_entries_kl(log_p, log_q))
    if support == "raw":
        value = value + (log_p.exp() - log_q.exp()).sum(-1)
    return _finish(value, mask, logprobs.dtype)


def _renormalised(logprobs: Tensor) -> Tensor:
    """log-probabilities of the chosen tokens alone; a row without any stays -inf."""
    nothing = logprobs.isneginf().all(-1, keepdim=True)
    return (logprobs - logprobs.masked_fill(nothing, 0.0).logsumexp(-1, keepdim=True)).masked_fill(nothing, -torch.inf)


def _log_tail(logprobs: Tensor) -> Tensor:
    """log(1 - sum of exp), clamped at log 0: 1 - the largest one's probability as -expm1, less the others."""
    if logprobs.shape[-1] == 0:
        return logprobs.new_zeros(logprobs.shape[:-1])
    top, at = logprobs.max(-1, keepdim=True)
    others = logprobs.scatter(-1, at, -torch.inf).exp().sum(-1)
    return (-top[..., 0].expm1() - others).clamp_min(0.0).log()


def _check_topk(ids: Tensor, logprobs: Tensor) -> None:
    if (bad := logprobs.isnan()).any():
        raise ValueError(f"teacher_logprobs must not be NaN, got {_first_bad(bad, of=logprobs)}")
    mass = logprobs.exp().sum(-1)
    if (bad := mass > 1 + SUM_TOLERANCE).any():
        raise ValueError(
            f"teacher_logprobs must be log-probabilities whose exponentials sum to at most 1 + {SUM_TOLERANCE:g} in each "
            f"row, got "
            f"{_first_bad(bad, of=mass)}; are they logits?"
        )
    ordered = ids.sort(dim=-1)[0]
    if (bad := (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any():
        raise ValueError(f"teacher_ids must be distinct in each row, got a repeated {_first_bad(bad, of=ordered[..., 1:])}")
