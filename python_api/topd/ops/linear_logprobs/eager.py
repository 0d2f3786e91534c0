"""topd::linear_logprobs in eager torch on full logits: the definition of the math.

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

from typing import Any, NamedTuple

import torch
from torch import Tensor

from topd.checks.values import in_vocabulary, no_second_derivative
from topd.head import Head
from topd.logits import shape_logits
from topd.ops.shared.full_products import head_product
from topd.ops.shared.repeats import runs_of

HEAD_VOCABULARY = "the rows of head.weight"


class LogprobSpec(NamedTuple):
    """The numbers that turn a matrix product into logits; the order of the op's arguments."""

    scale: float
    softcap: float | None
    temperature: float


class LogprobRows(NamedTuple):
    """Per row: logprobs [C, M], entropy [C] (or [0]), outside [C], all in the product's dtype; first [C, M], whether an id is
    its row's first of that value; slope [C, M], d z / d product at the ids (or [0, M], where it is the same everywhere);
    finite [C]; outside_grad and entropy_grad [C, V] to the raw product, or None."""

    logprobs: Tensor
    entropy: Tensor
    outside: Tensor
    first: Tensor
    slope: Tensor
    finite: Tensor
    outside_grad: Tensor | None
    entropy_grad: Tensor | None


def slope_of(logits: Tensor, spec: LogprobSpec) -> Tensor | float:
    """d z / d product; a number where there is no softcap."""
    scale = spec.scale / spec.temperature
    if spec.softcap is None:
        return scale
    tanh = (logits * (spec.temperature / spec.softcap)).clamp(-1, 1)  # -inf stands for an entry that is left out
    return scale * (1 - tanh * tanh)


def logprob_rows(
    product: Tensor, bias: Tensor | None, ids: Tensor, spec: LogprobSpec, *, grad: bool, entropy: bool
) -> LogprobRows:
    """From a matrix product (adapter included) to what `LogprobRows` holds.

    Args:
        product: [C, V] float32 or float64; constant.
        bias: [V] of that dtype, or None.
        ids: [C, M] int64.
        spec: the numbers.
        grad, entropy: what to compute beside log-probabilities.
    """
    vocab = product.shape[-1]
    logits = shape_logits(product, bias, spec.scale, spec.softcap, spec.temperature)
    at = ids.clamp(0, vocab - 1)
    inside = (ids >= 0) & (ids < vocab)
    chosen = logits.gather(-1, at).masked_fill(~inside, -torch.inf)
    first = runs_of(ids).first() & inside

    remove = torch.full_like(chosen, torch.inf).masked_fill_(inside, -torch.inf)
    rest = logits.scatter_reduce(-1, at, remove, "amin")
    rest_mode = rest.argmax(-1, keepdim=True)
    rest_top = rest.gather(-1, rest_mode)
    empty = rest_top.isneginf()
    shifted = (rest - rest_top.masked_fill(empty, 0.0)).exp()
    others = shifted.scatter(-1, rest_mode, 0.0).sum(-1, keepdim=True).double()  # beside the largest outside the ids

    # The normaliser from its few parts in double, its own largest term kept apart: log1p of the others has digits.
    counted = chosen.masked_fill(~first, -torch.inf).double()
    top = torch.cat([counted, rest_top.double()], -1).amax(-1, keepdim=True)
    finite = top.isfinite()
    safe = top.masked_fill(~finite, 0.0)
    outside_is_top = rest_top.double() == top
    parts = (counted - safe).exp()
    largest = torch.zeros_like(parts, dtype=torch.bool)
    if parts.shape[-1]:
        largest.scatter_(-1, counted.argmax(-1, keepdim=True), ~outside_is_top)
    outside_sum = torch.where(outside_is_top, others, (rest_top.double() - safe).exp() * (1 + others))
    log_rest = (outside_sum + parts.masked_fill(largest, 0.0).sum(-1, keepdim=True)).log1p()
    finite = finite & log_rest.isfinite()

    def of_row(value: Tensor) -> Tensor:
        return value.masked_fill(~finite, torch.nan).to(product.dtype)

    outside = ((rest_top.double() - safe) + others.log1p()) - log_rest
    slope = slope_of(chosen, spec)
    found = product.new_empty(0)
    entropy_grad = outside_grad = None
    if entropy:
        a = logits - safe.to(product.dtype)
        p = (a - log_rest.to(product.dtype)).exp()
        a = a.masked_fill(a.isneginf(), 0.0)
        mean = (p * a).sum(-1, keepdim=True)
        found = of_row(log_rest - mean)[..., 0]
        entropy_grad = -p * (a - mean) * slope_of(logits, spec)
    if grad:
        outside_grad = (shifted / (1 + others).to(product.dtype)) * slope_of(rest, spec)
        outside_grad = outside_grad.masked_fill(empty | ~finite, 0.0)
        entropy_grad = None if entropy_grad is None else entropy_grad.masked_fill(~finite, 0.0)
    return LogprobRows(
        of_row((chosen.double() - safe) - log_rest),
        found,
        of_row(outside)[..., 0],
        first,
        slope if isinstance(slope, Tensor) else product.new_empty(0, ids.shape[-1]),
        finite[..., 0],
        outside_grad,
        entropy_grad if grad else None,
    )


class _Rows(torch.autograd.Function):
    """Log-probabilities, entropy and outside mass of a product [N, V] (bias included) by their textbook formulas."""

    @staticmethod
    def forward(ctx: Any, product: Tensor, ids: Tensor, spec: LogprobSpec) -> tuple[Tensor, Tensor, Tensor]:
        z = shape_logits(product, None, *spec)
        logprobs = z.log_softmax(-1)
        inside = (ids >= 0) & (ids < z.shape[-1])
        at = ids.clamp(0, z.shape[-1] - 1)
        chosen = logprobs.gather(-1, at).masked_fill(~inside, -torch.inf)
        entropy = -(logprobs.exp() * logprobs.masked_fill(logprobs.isneginf(), 0.0)).sum(-1)
        remove = torch.full_like(chosen, torch.inf).masked_fill_(inside, -torch.inf)
        rest = logprobs.scatter_reduce(-1, at, remove, "amin")
        outside = rest.logsumexp(-1)
        ctx.spec = spec
        ctx.save_for_backward(product, ids, entropy, outside, rest.isneginf() & ~logprobs.isneginf())
        return chosen, entropy, outside

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _RowsGradient.apply(*grads, ctx.spec, *ctx.saved_tensors), None, None  # type: ignore[no-untyped-call]


class _RowsGradient(torch.autograd.Function):
    """Its backward; a row without an upstream gradient has none, whatever it holds."""

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, h: Tensor, o: Tensor, spec: LogprobSpec, product: Tensor, ids: Tensor, *rest: Tensor
    ) -> Tensor:
        z, unused = shape_logits(product, None, *spec), ((g == 0).all(-1) & (h == 0) & (o == 0)).unsqueeze(-1)
        entropy, outside, is_chosen = (rest[0].unsqueeze(-1), rest[1].unsqueeze(-1), rest[2])
        h, o = h.unsqueeze(-1), o.unsqueeze(-1)
        logprobs = z.log_softmax(-1)
        p = logprobs.exp()
        inside = (ids >= 0) & (ids < z.shape[-1])
        grad = torch.zeros_like(z).scatter_add(-1, ids.clamp(0, z.shape[-1] - 1), g.masked_fill(~inside, 0.0))
        grad = grad - p * (g.masked_fill(~inside, 0.0).sum(-1, keepdim=True) + o)
        share = (logprobs - outside.masked_fill(outside.isneginf(), 0.0)).exp()
        grad = grad + (o * share).masked_fill(is_chosen | (o == 0), 0.0)
        by_entropy = h * p * (logprobs.masked_fill(logprobs.isneginf(), 0.0) + entropy)
        grad = (grad - by_entropy.masked_fill(h == 0, 0.0)) * slope_of(z, spec)
        return grad.masked_fill(unused, 0.0)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise no_second_derivative("linear_logprobs")


def linear_logprobs(
    hidden: Tensor, head: Head, ids: Tensor, mask: Tensor | None, spec: LogprobSpec, *, padded: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """logprobs [N, M], entropy [N] and outside [N] of hidden states [N, H]; the matrix product's gradients are autograd's."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    n = hidden.shape[0]
    kept = torch.arange(n, device=hidden.device) if mask is None else mask.nonzero()[:, 0]
    chosen = in_vocabulary("ids", ids[kept], head.weight.shape[0], HEAD_VOCABULARY, low=-1 if padded else 0)
    with torch.autocast(hidden.device.type, enabled=False):
        found = _Rows.apply(head_product(hidden[kept], head, dtype), chosen, spec)  # type: ignore[no-untyped-call]
    return tuple(part.new_zeros(n, *part.shape[1:]).index_put((kept,), part) for part in found)
