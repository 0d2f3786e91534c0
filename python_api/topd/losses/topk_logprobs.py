"""`topk_logprobs`: the most likely tokens of each row, which make an offline teacher's targets."""

from typing import NamedTuple

import torch
from torch import Tensor

from topd.checks.values import check_temperature, check_workspace, per_token, positive_int
from topd.head import Head
from topd.losses.linear_logprobs import check_numbers
from topd.losses.operands import autocast, check_side, op_side, softcap_of, vocabulary_of
from topd.losses.sharding import checked_together, shard_of
from topd.losses.shared_rows import SharedRows
from topd.ops.linear_logprobs.spec import LogprobSpec
from topd.ops.topk_logprobs import op as topk_op


class TopK(NamedTuple):
    """The k most likely tokens of each row, the largest first.

    Attributes:
        logprobs: [..., k] floating, nats; -inf where there is no token.
        ids: [..., k] int64; 0 where there is no token.
    """

    logprobs: Tensor
    ids: Tensor


@torch.no_grad()
def topk_logprobs(
    hidden: Tensor,
    head: Head,
    k: int,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    workspace_bytes: int | None = None,
) -> TopK:
    """Return the k most likely tokens of each row and their log-probabilities, in chunks, without gradients.

    This makes the targets of an offline teacher.

    Args:
        hidden: [..., H] floating, dtype of `head.weight`.
        head: Head; it may be sharded over a group of processes: then all ranks make the same call, and get the same results,
            equal logits in the order of the ranks. With `VocabShard(sequence_parallel=True)` hidden states, mask and results
            are this rank's rows.
        k: 1 <= k <= V, the whole vocabulary of a sharded head.
        temperature: > 0; the logits are divided by it, after the softcap.
        mask: [...] bool; False rows cost nothing; their ids are 0 and their log-probabilities -inf.
        workspace_bytes: bound for the tile of logits, as in `linear_logprobs`.

    Returns:
        (logprobs, ids), in the order of torch.topk, with these names; log-probabilities [..., k] float32 (float64 for
        float64), nats, the largest first, and ids [..., k] int64.

    Raises:
        TypeError, ValueError: a wrong type, shape, dtype, device, range or option.
    """
    with checked_together(head, head) as pact:
        check_side("hidden", hidden, "head", head)
        check_temperature(temperature)
        check_workspace(workspace_bytes)
        if positive_int("k", k) > vocabulary_of(head):
            raise ValueError(f"k must be at most the vocabulary's {vocabulary_of(head)} entries, got {k}")
        flat_mask = None if mask is None else per_token("mask", mask, torch.bool, hidden, "hidden")
        states, head = autocast(hidden.reshape(-1, hidden.shape[-1]), head.detach())
        check_numbers(head, temperature, states.dtype)
        spec = LogprobSpec(float(head.scale), softcap_of(head), float(temperature))
        if pact is not None:
            pact.sign(states, head, head, (spec, k), None, flat_mask)
    rows = SharedRows(shard_of(head))
    own, states = states.shape[0], rows.gathered(states)
    (flat_mask,) = rows.of_all(flat_mask)
    inputs = topk_op.Inputs(op_side(states, head), flat_mask, *spec, k, workspace_bytes, shard=rows.shard)
    ids, logprobs = rows.own_results(own, *topk_op.topk_logprobs(inputs))
    shape = (*hidden.shape[:-1], k)
    return TopK(logprobs.reshape(shape), ids.reshape(shape))
