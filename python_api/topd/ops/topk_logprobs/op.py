"""topd::topk_logprobs: the k most likely tokens of each row and their log-probabilities, in chunks of rows, without gradients.

One matrix product; the tile of logits is float32 (float64 for float64). It is an op so that torch.compile takes it whole, and
need not know how many rows a mask keeps.
"""

from typing import Any

import torch
from torch import Tensor

from topd.backends import multiplies_bf16
from topd.logits import shape_logits
from topd.ops.shared.numbers import numbers_in
from topd.ops.shared.one_pass import chosen_rows, workspace
from topd.ops.shared.plan import plan_chunks
from topd.ops.shared.tiles import Side

torch.library.define(
    "topd::topk_logprobs",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor? a, Tensor? b, float scaling, Tensor? mask, float scale, "
    "float? softcap, float temperature, Tensor? numbers, int k, int? workspace_bytes) -> (Tensor ids, Tensor logprobs)",
)


def _topk_logprobs(*flat: Any) -> tuple[Tensor, Tensor]:
    side, mask, (scale, softcap, temperature, numbers, k, workspace_bytes) = Side(*flat[:6]), flat[6], flat[7:]
    (temperature,) = numbers_in(numbers, temperature)
    (n, _), vocab, device = side.hidden.shape, side.weight.shape[0], side.hidden.device
    dtype = torch.promote_types(side.hidden.dtype, torch.float32)
    side = side.widened(vocab, dtype, "cpp" if device.type == "cpu" and multiplies_bf16() else "eager")
    ids = torch.zeros(n, k, dtype=torch.int64, device=device)
    logprobs = torch.full((n, k), -torch.inf, dtype=dtype, device=device)
    chosen = chosen_rows(mask)
    plan = plan_chunks(
        n if chosen is None else chosen.numel(),
        vocab,
        itemsize=dtype.itemsize,
        workspace_bytes=workspace(device, workspace_bytes, side.weight.dtype),
        temporaries=2,
    )
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        tile = side.hidden.new_empty((plan.rows, vocab), dtype=dtype)
        for start, stop in plan.bounds():
            at = slice(start, stop) if chosen is None else chosen[start:stop]
            logits = tile[: stop - start]
            side.multiply(side.hidden[at], logits)
            logits = shape_logits(logits, side.bias, scale, softcap, temperature)
            top, ids[at] = logits.topk(k, dim=-1)
            rest = (logits - top[:, :1]).exp_().scatter_(-1, ids[at][:, :1], 0.0).sum(-1, keepdim=True)
            logprobs[at] = (top - top[:, :1]) - rest.log1p()
    return ids, logprobs


torch.library.impl("topd::topk_logprobs", "CompositeExplicitAutograd", _topk_logprobs)


@torch.library.register_fake("topd::topk_logprobs")
def _fake(hidden: Tensor, *flat: Any) -> tuple[Tensor, Tensor]:
    shape, dtype = (hidden.shape[0], flat[-2]), torch.promote_types(hidden.dtype, torch.float32)
    return hidden.new_empty(shape, dtype=torch.int64), hidden.new_empty(shape, dtype=dtype)
