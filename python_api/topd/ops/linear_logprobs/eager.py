"""The rows of linear_logprobs in eager torch: what the backend "eager" runs after the matrix product.

A row has logits z (temperature applied), log-normaliser log Z, p = exp(z - log Z), and the distinct ids I among its M
chosen ones:

    logprob_m = z[id_m] - log Z        outside = log q,  q = sum of p_v over v not in I
    entropy   = log Z - top - E,       top = max z,  E = sum_v p_v (z_v - top)

Gradient to z, with upstream g_m for the log-probabilities, G = sum_m g_m, o for outside and h for the entropy:

    v not in I    (p_v / q) (o (1 - q) - G q)                          - h p_v (z_v - top - E)
    i in I        sum of g_m over m with id_m = i, - p_i (G + o)       - h p_i (z_i - top - E)

So the dense part is one vector a row, p_v / q outside I (`outside_grad`), times a number that is linear in the upstreams; the
part at the ids is M numbers; the entropy's is a second dense vector (`entropy_grad`). Nothing of size p cancels between them: a
token whose probability is nearly 1 keeps the digits of its gradient. An id outside the vocabulary (a padded entry, or what
a GPU did not check) has log-probability -inf and no gradient.

The ranks of a sharded head gather two things. Before the sweep the chosen logits, -inf where another rank holds the token, and
(top, rest) outside the ids: M + 2 numbers of a row and rank. With the entropy also its E, one number more. Each rank then has
the gradients of its own tokens.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from topd.logits import shape_logits
from topd.ops.linear_logprobs.spec import ROWS_INPUTS, LogprobRows, LogprobSpec, RowsInputs, RowsOutputs
from topd.ops.shared.engines import eager_kernel
from topd.ops.shared.float16_scale import scaled_into
from topd.ops.shared.repeats import runs_of
from topd.ops.shared.shard import WHOLE, Shard, combined, in_rank_order


def slope_of(logits: Tensor, spec: LogprobSpec) -> Tensor | float:
    """Return d z / d product; a number where there is no softcap."""
    scale = spec.scale / spec.temperature
    if spec.softcap is None:
        return scale
    tanh = (logits * (spec.temperature / spec.softcap)).clamp(-1, 1)  # -inf stands for an entry that is left out
    return scale * (1 - tanh * tanh)


class Statistics(NamedTuple):
    """What is known of rows before the sweep: the chosen logits [C, M]; of the logits outside the ids the largest [C, 1] and,
    in double, the sum of exp(z - largest) beside it; what exp(z - the largest that is here) is divided by to be p_v / q."""

    chosen: Tensor
    top: Tensor
    others: Tensor
    divisor: Tensor


def _statistics(chosen: Tensor, top: Tensor, others: Tensor, shard: Shard) -> Statistics:
    """Return them over all ranks, from those of the tokens here; one gather, or none."""
    if not shard.split:
        return Statistics(chosen, top, others, 1 + others)
    everyone = shard.gathered(torch.cat([chosen, top, others.to(top.dtype)], -1))
    *_, tops, rests = everyone.unbind(-1)
    parts = combined(tops, rests)
    whole_top, whole_others = parts.top.unsqueeze(-1), parts.rest.unsqueeze(-1)
    divisor = (1 + whole_others) * (whole_top.double() - top.double()).exp()
    return Statistics(everyone[..., :-2].amax(0), whole_top, whole_others, divisor)


def logprob_rows(
    product: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    spec: LogprobSpec,
    *,
    grad: bool,
    entropy: bool,
    shard: Shard = WHOLE,
    tokens: int = 0,
) -> LogprobRows:
    """Return what `LogprobRows` holds from a matrix product (adapter included).

    Args:
        product: [C, V] float32 or float64; constant.
        bias: [V] of that dtype, or None.
        ids: [C, M] int64.
        spec: the numbers.
        grad, entropy: what to compute beside log-probabilities.
        shard, tokens: which tokens the product is of, and, where other ranks hold further ones, how many there are in all.
    """
    held = product.shape[-1]
    logits = shape_logits(product, bias, spec.scale, spec.softcap, spec.temperature)
    if not held:  # a rank of a sharded head may hold nothing; a token of probability 0 changes nothing
        logits = logits.new_full((*logits.shape[:-1], 1), -torch.inf)
    vocab, local = logits.shape[-1], shard.local(ids)
    index = local.clamp(0, vocab - 1)
    inside = (local >= 0) & (local < vocab)
    chosen = logits.gather(-1, index).masked_fill(~inside, -torch.inf)
    first = runs_of(ids).first() & ((ids >= 0) & (ids < tokens) if shard.split else inside)

    remove = torch.full_like(chosen, torch.inf).masked_fill_(inside, -torch.inf)
    rest = logits.scatter_reduce(-1, index, remove, "amin")
    rest_mode = rest.argmax(-1, keepdim=True)
    top_here = rest.gather(-1, rest_mode)
    empty = top_here.isneginf()
    shifted = (rest - top_here.masked_fill(empty, 0.0)).exp()
    others = shifted.scatter(-1, rest_mode, 0.0).sum(-1, keepdim=True).double()  # beside the largest outside the ids
    chosen, rest_top, others, divisor = _statistics(chosen, top_here, others, shard)
    top, log_rest, finite = _normaliser(chosen.masked_fill(~first, -torch.inf).double(), rest_top.double(), others)

    def of_row(value: Tensor) -> Tensor:
        return value.masked_fill(~finite, torch.nan).to(product.dtype)

    outside = ((rest_top.double() - top) + others.log1p()) - log_rest
    slope = slope_of(chosen, spec)
    entropies = product.new_empty(0)
    entropy_grad = outside_grad = None
    if entropy:
        offsets = top.to(product.dtype), log_rest.to(product.dtype)
        below_top, entropy_grad = _entropy(logits, *offsets, slope_of(logits, spec), shard)
        entropies = of_row(log_rest - below_top)[..., 0]
    if grad:
        outside_grad = (shifted / divisor.to(product.dtype)) * slope_of(rest, spec)
        outside_grad = outside_grad.masked_fill(empty | ~finite, 0.0)[..., :held]
        entropy_grad = None if entropy_grad is None else entropy_grad.masked_fill(~finite, 0.0)[..., :held]
    return LogprobRows(
        of_row((chosen.double() - top) - log_rest),
        entropies,
        of_row(outside)[..., 0],
        first,
        slope if isinstance(slope, Tensor) else product.new_empty(0, ids.shape[-1]),
        finite[..., 0],
        outside_grad,
        entropy_grad if grad else None,
    )


def _normaliser(counted: Tensor, rest_top: Tensor, others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return top = max z (0 where it is not finite), log Z - top, and whether both are finite, each [C, 1], from few parts in
    double, of which the largest is kept apart: log1p of the others has digits.

    Args:
        counted: [C, M] the logits of the distinct ids, -inf elsewhere.
        rest_top: [C, 1] the largest logit outside the ids.
        others: [C, 1] the sum of exp(z - rest_top) over the others there.
    """
    top = torch.cat([counted, rest_top], -1).amax(-1, keepdim=True)
    finite = top.isfinite()
    safe = top.masked_fill(~finite, 0.0)
    outside_is_top = rest_top == top
    parts = (counted - safe).exp()
    largest = torch.zeros_like(parts, dtype=torch.bool)
    if parts.shape[-1]:
        largest.scatter_(-1, counted.argmax(-1, keepdim=True), ~outside_is_top)
    outside_sum = torch.where(outside_is_top, others, (rest_top - safe).exp() * (1 + others))
    log_rest = (outside_sum + parts.masked_fill(largest, 0.0).sum(-1, keepdim=True)).log1p()
    return safe, log_rest, finite & log_rest.isfinite()


def _entropy(logits: Tensor, top: Tensor, log_rest: Tensor, slope: Tensor | float, shard: Shard) -> tuple[Tensor, Tensor]:
    """Return E = sum p (z - top) [C, 1] over all ranks and the entropy's gradient to the product [C, V]."""
    a = logits - top
    p = (a - log_rest).exp()
    a = a.masked_fill(a.isneginf(), 0.0)
    mean = (p * a).sum(-1, keepdim=True)
    if shard.split:
        mean = in_rank_order(shard.gathered(mean).double()).to(mean.dtype)
    return mean, -p * (a - mean) * slope


@eager_kernel("logprob_rows")
def _kernel(*flat: Any) -> RowsOutputs:
    rows = rows_in_tiles(ROWS_INPUTS.unpack(*flat), WHOLE, 0)
    return RowsOutputs(rows.logprobs, rows.entropy, rows.outside, rows.first, rows.slope, rows.finite)


def rows_in_tiles(inputs: RowsInputs, shard: Shard, tokens: int) -> LogprobRows:
    """Return what topd::logprob_rows does, of rows whose vocabulary may be split; the gradients are in the inputs' tiles."""
    wanted: dict[str, Any] = {"grad": inputs.grad, "entropy": inputs.entropy, "shard": shard, "tokens": tokens}
    rows = logprob_rows(inputs.product, inputs.bias, inputs.ids, inputs.spec, **wanted)
    tile = inputs.product if inputs.grad_tile is None else inputs.grad_tile
    if rows.outside_grad is not None:
        scaled_into(tile, rows.outside_grad, inputs.grad_scale)
    if rows.entropy_grad is not None and inputs.entropy_tile is not None:
        scaled_into(inputs.entropy_tile, rows.entropy_grad, inputs.grad_scale)
    return rows._replace(outside_grad=tile if inputs.grad else None, entropy_grad=inputs.entropy_tile)
