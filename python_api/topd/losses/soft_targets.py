"""`soft_target_kl`: the KL to a target distribution over a few tokens of each row."""

import torch
from torch import Tensor

from topd.checks.distributions import check_ids_in_vocabulary, check_like_ids, check_targets, checks_values
from topd.checks.tokens import check_chosen_ids
from topd.checks.values import flag, per_token
from topd.head import Head
from topd.losses.entry_kl import entries_kl, with_bucket, zero_masked
from topd.losses.linear_logprobs import logprobs_and_outside
from topd.losses.operands import check_side, vocabulary_of
from topd.losses.sharding import passed_together
from topd.ops.shared.repeats import runs_of
from topd.options import BackendName


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
    """Return KL(q || p_S) of a target distribution q over a few tokens of each row, from hidden states.

    It is computed as the sum of q log(q / p_S) - q + p_S, which is the same where q sums to 1, and never negative where its sum
    is a little off. Composed on `linear_logprobs`.

    Args:
        hidden: [..., H] floating, dtype of `head.weight`; differentiated.
        head: the student's Head, also sharded, as in `linear_logprobs`.
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
    with passed_together(head):
        check_side("hidden", hidden, "head", head, may_be_sharded=True)
        check_chosen_ids("target_ids", target_ids, hidden)
        flag("normalize", normalize)
        probs = check_like_ids("target_probs", target_probs, target_ids).double()
        if mask is not None:
            per_token("mask", mask, torch.bool, hidden, "hidden")
            probs = probs.masked_fill(~mask.unsqueeze(-1), 0.0)
        if checks_values(hidden):
            check_targets("target_probs", probs, mask, normalize=normalize)
            check_ids_in_vocabulary("target_ids", target_ids, probs != 0, vocabulary_of(head))
    total = probs.sum(-1)
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
    value = entries_kl(with_bucket(merged.log(), nothing), with_bucket(logprobs.double(), outside.double()))
    return zero_masked(value, mask, logprobs.dtype)


def _merged(ids: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
    """Return ids and probabilities with each id once a row: repeats give theirs to the first, and where nothing is left the id
    is -1."""
    runs = runs_of(ids)
    total = runs.totals(probs)
    each = torch.full_like(ids, -1).scatter(-1, runs.run, runs.ordered)
    return each.masked_fill(total == 0, -1), total
