"""topd::topk_logprobs: the k most likely tokens of each row and their log-probabilities, in chunks of rows, without gradients.

One matrix product; the tile of logits is float32 (float64 for float64). It is an op so that torch.compile takes it whole, and
need not know how many rows a mask keeps.

The ranks of a sharded head gather, of each row, their own k largest logits, the tokens of these, and (top, rest) of their
softmax: 2 k + 2 doubles of a row and rank, as a double holds every float32 and every token. Each rank then takes the k largest.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from topd.backends import multiplies_bf16
from topd.logits import shape_logits
from topd.ops.shared.engines import CPP, EAGER
from topd.ops.shared.fields import Table
from topd.ops.shared.loop import TileLoop, chosen_rows, plan_rows
from topd.ops.shared.numbers import numbers_in, numbers_of
from topd.ops.shared.op_body import define, op_body
from topd.ops.shared.row_math import distribution
from topd.ops.shared.shard import WHOLE, Shard, combined
from topd.ops.shared.tiles import Side


class Inputs(NamedTuple):
    """The arguments of topd::topk_logprobs. hidden [N, H], mask [N] bool; `numbers`: what `topd.ops.shared.numbers` packed, or
    None; `shard`: which tokens the head holds here."""

    side: Side
    mask: Tensor | None
    scale: float
    softcap: float | None
    temperature: float
    k: int
    workspace_bytes: int | None
    numbers: Tensor | None = None
    shard: Shard = WHOLE

    @property
    def dtype(self) -> torch.dtype:
        """The tile's dtype, and that of the log-probabilities."""
        return torch.promote_types(self.side.hidden.dtype, torch.float32)


class Outputs(NamedTuple):
    """The results: ids [N, k] int64, log-probabilities [N, k]; 0 and -inf where masked."""

    ids: Tensor
    logprobs: Tensor


INPUTS, OUTPUTS = Table(Inputs), Table(Outputs)
define("topd::topk_logprobs", f"({INPUTS.schema}) -> ({OUTPUTS.schema})")

# Tiles that a chunk keeps beside the logits, at most.
TEMPORARIES = 2


def topk_logprobs(inputs: Inputs) -> Outputs:
    """Return the k most likely tokens of checked operands."""
    numbers = numbers_of(inputs.temperature)
    if numbers is not None:
        inputs = inputs._replace(temperature=1.0, numbers=numbers)
    return Outputs(*torch.ops.topd.topk_logprobs(*INPUTS.pack(inputs)))


def _computed(inputs: Inputs) -> Outputs:
    (temperature,) = (inputs.temperature,) if inputs.numbers is None else numbers_in(inputs.numbers)
    (n, _), vocab, device = inputs.side.hidden.shape, inputs.side.weight.shape[0], inputs.side.hidden.device
    engine = CPP if device.type == "cpu" and multiplies_bf16() else EAGER
    side = inputs.side.widened(vocab, inputs.dtype, engine)
    ids = torch.zeros(n, inputs.k, dtype=torch.int64, device=device)
    logprobs = torch.full((n, inputs.k), -torch.inf, dtype=inputs.dtype, device=device)
    chosen = chosen_rows(inputs.mask)
    plan = plan_rows(
        n if chosen is None else chosen.numel(),
        vocab,
        engine=engine,
        device=device,
        multiplied=side.weight.dtype,
        workspace_bytes=inputs.workspace_bytes,
        itemsize=inputs.dtype.itemsize,
        temporaries=TEMPORARIES,
        shard=inputs.shard,
    )
    for chunk in TileLoop(engine, plan, (side,), chosen, inputs.dtype):
        (product,) = chunk.products
        logits = shape_logits(product, side.bias, inputs.scale, inputs.softcap, temperature)
        if inputs.shard.split:
            ids[chunk.row_index], logprobs[chunk.row_index] = _over_ranks(logits, inputs.k, inputs.shard)
            continue
        top, top_ids = logits.topk(inputs.k, dim=-1)
        rest = (logits - top[:, :1]).exp_().scatter_(-1, top_ids[:, :1], 0.0).sum(-1, keepdim=True)
        ids[chunk.row_index], logprobs[chunk.row_index] = top_ids, (top - top[:, :1]) - rest.log1p()
    return Outputs(ids, logprobs)


def _over_ranks(logits: Tensor, k: int, shard: Shard) -> Outputs:
    """Return the k most likely tokens of all ranks' logits, of which [C, V] are here; one gather.

    Equal logits stand in the order of the ranks, and within a rank as torch.topk has them.
    """
    here = min(k, logits.shape[-1])
    top, columns = logits.topk(here, dim=-1)
    softmax = distribution(logits)
    mine = logits.new_full((logits.shape[0], 2 * k + 2), -1.0, dtype=torch.float64)  # -1: no token
    mine[:, :k] = -torch.inf
    mine[:, :here], mine[:, k : k + here] = top, columns + shard.start
    mine[:, 2 * k], mine[:, 2 * k + 1] = softmax.top[:, 0], softmax.rest[:, 0]
    everyone = shard.gathered(mine)
    whole = combined(everyone[..., 2 * k], everyone[..., 2 * k + 1])
    candidates, tokens = (part.transpose(0, 1).flatten(1) for part in (everyone[..., :k], everyone[..., k : 2 * k]))
    # What is no token goes last: it must not stand before a token whose logit is -inf too.
    order = (tokens < 0).to(torch.uint8).sort(stable=True, dim=-1).indices
    order = order.gather(-1, candidates.gather(-1, order).sort(stable=True, dim=-1, descending=True).indices)[:, :k]
    shifted = candidates.gather(-1, order) - whole.top.unsqueeze(-1)
    return Outputs(tokens.gather(-1, order).long(), (shifted - whole.rest.log1p().unsqueeze(-1)).to(logits.dtype))


def _implementation(*flat: Any) -> tuple[Any, ...]:
    inputs = INPUTS.unpack(*flat)
    with op_body("topk_logprobs", inputs.side.hidden.device):
        return OUTPUTS.pack(_computed(inputs))


torch.library.impl("topd::topk_logprobs", "CompositeExplicitAutograd", _implementation)


@torch.library.register_fake("topd::topk_logprobs")
def _fake(*flat: Any) -> tuple[Any, ...]:
    inputs = INPUTS.unpack(*flat)
    hidden, shape = inputs.side.hidden, (inputs.side.hidden.shape[0], inputs.k)
    return OUTPUTS.pack(Outputs(hidden.new_empty(shape, dtype=torch.int64), hidden.new_empty(shape, dtype=inputs.dtype)))
