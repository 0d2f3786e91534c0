"""`linear_logprobs`, the second primitive: its arguments are checked, leading shapes made flat, then the op runs."""

from typing import Literal, overload

import torch
from torch import Tensor

from topd.checks.tokens import check_chosen_ids
from topd.checks.values import (
    FLOATING,
    check_range,
    check_temperature,
    check_workspace,
    flag,
    in_vocabulary,
    no_forward_mode,
    per_token,
)
from topd.head import Head
from topd.losses.operands import autocast, check_head_range, check_side, kept_side, needs, op_side, softcap_of, vocabulary_of
from topd.losses.sharding import backend_of, checked_together, checksum_of, shard_of
from topd.losses.shared_rows import SharedRows
from topd.ops.linear_logprobs import full_logits
from topd.ops.linear_logprobs import op as linear_logprobs_op
from topd.ops.linear_logprobs.spec import SHARDED_VOCABULARY, Call, LogprobSpec
from topd.ops.shared.engines import engine_of
from topd.options import BackendName


@overload
def linear_logprobs(
    hidden: Tensor,
    head: Head,
    ids: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weights_hint: Tensor | None = None,
    return_entropy: Literal[False] = False,
    workspace_bytes: int | None = None,
    backend: BackendName | None = None,
) -> Tensor: ...


@overload
def linear_logprobs(
    hidden: Tensor,
    head: Head,
    ids: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weights_hint: Tensor | None = None,
    return_entropy: Literal[True],
    workspace_bytes: int | None = None,
    backend: BackendName | None = None,
) -> tuple[Tensor, Tensor]: ...


@overload
def linear_logprobs(
    hidden: Tensor,
    head: Head,
    ids: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weights_hint: Tensor | None = None,
    return_entropy: bool,
    workspace_bytes: int | None = None,
    backend: BackendName | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...


def linear_logprobs(
    hidden: Tensor,
    head: Head,
    ids: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weights_hint: Tensor | None = None,
    return_entropy: bool = False,
    workspace_bytes: int | None = None,
    backend: BackendName | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return log-probabilities of chosen tokens, and the entropy, from hidden states, without [N, V] logits.

    Exact values and gradients for any upstream gradient, at the cost of three matrix products (two with a frozen head). With
    M = 1 and the next tokens as ids, minus the result is the cross-entropy.

    Args:
        hidden: [..., H] float32, float64, bfloat16 or float16, dtype of `head.weight`; differentiated.
        head: Head; weight, bias and adapter are differentiated where they require grad. It may be sharded over a group of
            processes: then all ranks make the same call on the same hidden states and ids, and get the same results, the whole
            d hidden and d adapter.a, and the other gradients of their own tokens. With `VocabShard(sequence_parallel=True)`
            hidden states, ids, mask, hint and results are this rank's rows; those of all ranks are gathered for the call and
            kept for the backward pass.
        ids: [..., M] int64, M >= 0, tokens of which the log-probability is wanted; repeats allowed. Those of unmasked rows lie
            in [0, V): checked on the CPU; on a GPU, where a check would stall it, any other has log-probability -inf and no
            gradient. With a sharded head V is the whole vocabulary, on every rank.
        temperature: > 0; the logits are divided by it, after the softcap.
        mask: [...] bool; False rows cost nothing, are exactly 0 and get exactly 0 gradient, whatever they hold.
        weights_hint: [...] floating, what the sum over M of a row's upstream gradients will be, up to one factor: where it is
            right the backward pass costs nothing more; it never changes a value.
        return_entropy: also return the entropy, differentiable like the log-probabilities; using its gradient costs three more
            matrix products (one with a frozen head).
        workspace_bytes: bound for the tile of logits; None: 512 MiB on a CPU, 256 where it multiplies bfloat16; on a GPU what
            chunks of 4,096 rows need, within the largest power of two in a quarter of the memory that is available.
        backend: None (by device), "reference", "eager", "cpp" or "triton"; one asked for by name never falls back. A sharded
            head runs on "eager".

    Returns:
        [..., M] float32 (float64 for float64), nats; with return_entropy a pair of it and the entropy [...], nats. -inf logits
        mean probability 0: log-probability -inf, nothing added to the entropy.

    Raises:
        TypeError, ValueError: a wrong type, shape, dtype, device, range or option.
    """
    flag("return_entropy", return_entropy)
    logprobs, entropy, _ = logprobs_and_outside(
        hidden,
        head,
        ids,
        temperature=temperature,
        mask=mask,
        weights_hint=weights_hint,
        entropy=return_entropy,
        workspace_bytes=workspace_bytes,
        backend=backend,
    )
    return (logprobs, entropy) if return_entropy else logprobs


def check_numbers(head: Head, temperature: float, dtype: torch.dtype) -> None:
    """Check that the tile, float32 or wider, holds the numbers that the kernels compute with."""
    dtype = torch.promote_types(dtype, torch.float32)
    check_range("temperature", temperature, dtype)
    check_head_range("head", head, temperature, dtype)


def logprobs_and_outside(
    hidden: Tensor,
    head: Head,
    ids: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weights_hint: Tensor | None = None,
    entropy: bool = False,
    workspace_bytes: int | None = None,
    backend: BackendName | None = None,
    padded: bool = False,
    dense: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `linear_logprobs` does, and beside it the log of the mass outside each row's ids.

    Args:
        padded: an id of -1 stands for no token: log-probability -inf, no gradient.
        dense: whether forward sums the head's gradients under the hint. Without it they wait for the backward pass, which is
            cheaper where no hint can be right, and cheapest where the upstream gradients of a row add up to 0.

    Returns:
        logprobs [..., M], entropy [...] (or [0]), outside [...].
    """
    with checked_together(head, head) as pact:
        check_side("hidden", hidden, "head", head)
        hidden, head = kept_side("hidden", hidden, "head", head)
        ids = check_chosen_ids("ids", ids, hidden)
        check_temperature(temperature)
        check_workspace(workspace_bytes)
        no_forward_mode("linear_logprobs", (hidden, *head.tensors().values()))
        like = (hidden, "hidden")
        flat_mask = None if mask is None else per_token("mask", mask, torch.bool, *like)
        hint = None if weights_hint is None else per_token("weights_hint", weights_hint, FLOATING, *like).detach()
        shard, vocab = shard_of(head), vocabulary_of(head)
        name = backend_of(backend, hidden.device, shard)
        shape, flat_ids = tuple(hidden.shape[:-1]), ids.reshape(hidden.shape[:-1].numel(), ids.shape[-1])
        states, head = autocast(hidden.reshape(-1, hidden.shape[-1]), head)
        check_numbers(head, temperature, states.dtype)
        spec = LogprobSpec(float(head.scale), softcap_of(head), float(temperature))
        if pact is not None:
            counted = flat_ids if flat_mask is None else flat_ids[flat_mask]
            in_vocabulary("ids", counted, vocab, SHARDED_VOCABULARY, low=-1 if padded else 0)
            options = (spec, entropy, padded, dense, ids.shape[-1], None if hint is None else hint.dtype)
            same_ids = None if shard.sequence else checksum_of(counted)
            pact.sign(states, head, head, (*options, same_ids), None, flat_mask)
    if name == "reference":
        logprobs, entropies, outside = full_logits.linear_logprobs(states, head, flat_ids, flat_mask, spec, padded=padded)
    else:
        settings, rows = (spec, workspace_bytes, engine_of(name), padded, dense), SharedRows(shard)
        n, states = states.shape[0], rows.gathered(states)
        flat_ids, flat_mask, hint = rows.of_all(flat_ids, flat_mask, hint)
        call = Call(op_side(states, head), flat_mask, flat_ids, *settings, shard=rows.shard, tokens=vocab)
        results = linear_logprobs_op.linear_logprobs(call, hint, needs(states, head), entropy=entropy)
        logprobs, entropies, outside = rows.own_results(n, *results)
    return logprobs.reshape(ids.shape), entropies.reshape(shape) if entropy else entropies, outside.reshape(shape)
