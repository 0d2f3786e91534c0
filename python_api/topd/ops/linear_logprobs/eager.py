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
"""

from typing import Any

import torch
from torch import Tensor

from topd.logits import shape_logits
from topd.ops.linear_logprobs.spec import ROWS_INPUTS, LogprobRows, LogprobSpec, RowsOutputs
from topd.ops.shared.engines import eager_kernel
from topd.ops.shared.float16_scale import scaled_into
from topd.ops.shared.repeats import runs_of


def slope_of(logits: Tensor, spec: LogprobSpec) -> Tensor | float:
    """Return d z / d product; a number where there is no softcap."""
    scale = spec.scale / spec.temperature
    if spec.softcap is None:
        return scale
    tanh = (logits * (spec.temperature / spec.softcap)).clamp(-1, 1)  # -inf stands for an entry that is left out
    return scale * (1 - tanh * tanh)


def logprob_rows(
    product: Tensor, bias: Tensor | None, ids: Tensor, spec: LogprobSpec, *, grad: bool, entropy: bool
) -> LogprobRows:
    """Return what `LogprobRows` holds from a matrix product (adapter included).

    Args:
        product: [C, V] float32 or float64; constant.
        bias: [V] of that dtype, or None.
        ids: [C, M] int64.
        spec: the numbers.
        grad, entropy: what to compute beside log-probabilities.
    """
    vocab = product.shape[-1]
    logits = shape_logits(product, bias, spec.scale, spec.softcap, spec.temperature)
    index = ids.clamp(0, vocab - 1)
    inside = (ids >= 0) & (ids < vocab)
    chosen = logits.gather(-1, index).masked_fill(~inside, -torch.inf)
    first = runs_of(ids).first() & inside

    remove = torch.full_like(chosen, torch.inf).masked_fill_(inside, -torch.inf)
    rest = logits.scatter_reduce(-1, index, remove, "amin")
    rest_mode = rest.argmax(-1, keepdim=True)
    rest_top = rest.gather(-1, rest_mode)
    empty = rest_top.isneginf()
    shifted = (rest - rest_top.masked_fill(empty, 0.0)).exp()
    others = shifted.scatter(-1, rest_mode, 0.0).sum(-1, keepdim=True).double()  # beside the largest outside the ids
    top, log_rest, finite = _normaliser(chosen.masked_fill(~first, -torch.inf).double(), rest_top.double(), others)

    def of_row(value: Tensor) -> Tensor:
        return value.masked_fill(~finite, torch.nan).to(product.dtype)

    outside = ((rest_top.double() - top) + others.log1p()) - log_rest
    slope = slope_of(chosen, spec)
    entropies = product.new_empty(0)
    entropy_grad = outside_grad = None
    if entropy:
        below_top, entropy_grad = _entropy(logits, top.to(product.dtype), log_rest.to(product.dtype), slope_of(logits, spec))
        entropies = of_row(log_rest - below_top)[..., 0]
    if grad:
        outside_grad = (shifted / (1 + others).to(product.dtype)) * slope_of(rest, spec)
        outside_grad = outside_grad.masked_fill(empty | ~finite, 0.0)
        entropy_grad = None if entropy_grad is None else entropy_grad.masked_fill(~finite, 0.0)
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


def _entropy(logits: Tensor, top: Tensor, log_rest: Tensor, slope: Tensor | float) -> tuple[Tensor, Tensor]:
    """Return E = sum p (z - top) [C, 1] and the entropy's gradient to the product [C, V]."""
    a = logits - top
    p = (a - log_rest).exp()
    a = a.masked_fill(a.isneginf(), 0.0)
    mean = (p * a).sum(-1, keepdim=True)
    return mean, -p * (a - mean) * slope


@eager_kernel("logprob_rows")
def _kernel(*flat: Any) -> RowsOutputs:
    inputs = ROWS_INPUTS.unpack(*flat)
    rows = logprob_rows(inputs.product, inputs.bias, inputs.ids, inputs.spec, grad=inputs.grad, entropy=inputs.entropy)
    if rows.outside_grad is not None:
        scaled_into(inputs.product if inputs.grad_tile is None else inputs.grad_tile, rows.outside_grad, inputs.grad_scale)
    if rows.entropy_grad is not None and inputs.entropy_tile is not None:
        scaled_into(inputs.entropy_tile, rows.entropy_grad, inputs.grad_scale)
    return RowsOutputs(rows.logprobs, rows.entropy, rows.outside, rows.first, rows.slope, rows.finite)
