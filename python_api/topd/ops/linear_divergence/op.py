"""topd::linear_divergence: per-token divergences from hidden states and heads, gradients made in the same pass.

value_n = D(p_T, p_S)_n + hard_weight (-log p_S(token_n)); the gradient of sum_n g_n value_n is linear in g. Forward keeps
u_n = d value_n / d hidden_n, and sums the head's gradients under the weights that the caller will probably use (the hint,
or 1). Backward is d hidden = g ⊙ u, exact for every g; for the head it takes c = median(g / hint): rows with g = c hint are
done, rows that deviate are computed again and corrected, or, where fewer rows have a gradient at all, or correcting would lose
digits, the sums start anew. Masked rows have a gradient of 0 whatever g they get.

Precision: tiles, u and the head's gradients are float32 (float64 for float64), cast once when returned; on a GPU the gradients
to 16-bit products are rounded to 16 bits. Cost: 4 matrix
products (3 with a frozen head), 2 + 1 more for each deviating row. Read per token and head: as the matrix products do.
"""

from typing import Any

import torch
from torch import Tensor

from topd.checks.values import in_vocabulary, no_forward_mode
from topd.ops.linear_divergence.eager import COMMON_VOCABULARY
from topd.ops.linear_divergence.loop import Call
from topd.ops.shared.advise_huge_pages import buffer
from topd.ops.shared.few_rows import Kinds, divergence_gradients, keeps_dlogits
from topd.ops.shared.one_pass import (
    at_inputs,
    chosen_rows,
    common_factor,
    correction,
    normalised_hint,
    refuse_inference_tensors,
    refuse_second_derivative,
    returned,
    save_call,
    saved_call,
    unfilled_gradients,
)
from topd.ops.shared.plan import prefers_fused
from topd.ops.shared.tiles import HeadGrads
from topd.scores import FIELDS


def _side_schema(side: str) -> str:
    return (
        f"Tensor {side}_hidden, Tensor {side}_weight, Tensor? {side}_bias, Tensor? {side}_a, Tensor? {side}_b, "
        f"float {side}_scaling, "
    )


_COMMON = (
    _side_schema("student")
    + _side_schema("teacher")
    + "Tensor? mask, Tensor? tokens, float student_scale, float? student_softcap, float teacher_scale, "
    "float? teacher_softcap, float temperature, str divergence, float parameter, float hard_weight, "
    "int? workspace_bytes, str backend, Tensor? numbers, "
)
_NEEDS = "bool hidden_grad, bool weight_grad, bool bias_grad, bool adapter_grad"
_HEAD_GRADS = "Tensor weight, Tensor bias, Tensor a, Tensor b"


N_COMMON = 25


torch.library.define(
    "topd::linear_divergence",
    f"({_COMMON}Tensor? weights_hint, {_NEEDS}, bool keep, bool scores) -> "
    f"(Tensor value, Tensor scores, Tensor u, {_HEAD_GRADS}, Tensor hint, Tensor dlogits)",
)
torch.library.define(
    "topd::linear_divergence_backward",
    f"(Tensor grad_value, {_COMMON}Tensor u, {_HEAD_GRADS}, Tensor hint, Tensor dlogits, bool uniform_hint, {_NEEDS}) -> "
    f"(Tensor hidden, {_HEAD_GRADS})",
)


def _forward(*flat: Any) -> tuple[Tensor, ...]:
    call = Call.unpack(flat[:N_COMMON]).settled()
    hint, hidden_grad, weight_grad, bias_grad, adapter_grad, keep, scores = flat[N_COMMON:]
    if hidden_grad or weight_grad or bias_grad or adapter_grad:
        refuse_inference_tensors("linear_divergence", flat[:N_COMMON])
    student = call.student
    n, device = student.hidden.shape[0], student.hidden.device
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        value = torch.zeros(n, dtype=call.dtype, device=device)
        found = value.new_zeros(len(FIELDS) if scores else 0, n)
        u = value.new_zeros((n, student.hidden.shape[1]) if hidden_grad else (0, 0))
        keeps = keep and keeps_dlogits(call, weight_grad=weight_grad, scores=scores)
        dlogits = _dlogits(call, keeps=keeps, scores=scores)
        kinds = {"weight": weight_grad and not keeps, "bias": bias_grad and not keeps, "adapter": adapter_grad and not keeps}
        grads = HeadGrads.empty(student, call.vocab, call.dtype, call.backend, **kinds)
        used_hint = value.new_zeros(n if keeps else 0)
        if grads.wanted:
            used_hint = normalised_hint(hint, call.mask, value)
        chosen = chosen_rows(call.mask)
        if call.tokens is not None:
            in_vocabulary("tokens", call.tokens if chosen is None else call.tokens[chosen], call.vocab, COMMON_VOCABULARY)
        grad = hidden_grad or grads.wanted or keeps
        loop = call.loop(chosen, full_width=scores)
        if scores and not grad and call.fused and prefers_fused(loop.plan):
            at = slice(None) if chosen is None else chosen
            found[:, at] = call.fused_scores(at)
            return found[FIELDS.index(call.spec.divergence)].clone(), found, u, *grads, used_hint, dlogits
        if loop.plan.n == 0:
            grads.zero()
        if keeps:
            dlogits[loop.plan.n :].zero_()
        for chunk in loop.run(grad=grad, scores=scores, student_tile=dlogits if keeps else None):
            value[chunk.at] = chunk.rows.value
            if scores:
                found[:, chunk.at] = chunk.rows.scores
            if (made := chunk.gradients) is None:
                continue
            through_adapter = loop.student.through_adapter(made.grad_logits)
            if hidden_grad and isinstance(made.at, slice):
                loop.student.hidden_grad(made.grad_logits, through_adapter, made.finite, out=u[made.at])
            elif hidden_grad:
                u[made.at] = loop.student.hidden_grad(made.grad_logits, through_adapter, made.finite)
            if keeps:
                used_hint[made.at] = made.finite.to(used_hint.dtype)
            if grads.wanted:
                weights = used_hint[made.at].masked_fill(~made.finite, 0.0)
                used_hint[made.at] = weights
                sums = (loop.student, made.grad_logits, through_adapter, made.hidden, weights)
                grads.add(*sums, first=made.first, normalised=True)
        return value, found, u, *grads, used_hint, dlogits


def _dlogits(call: Call, *, keeps: bool, scores: bool) -> Tensor:
    """The tile that forward leaves for backward, uninitialised; empty where none is kept."""
    weight = call.student.weight
    shape = (call.student.hidden.shape[0], weight.shape[0] if scores else call.vocab) if keeps else (0, 0)
    return buffer(shape, weight, call.dtype, call.backend)


def _head_grads(call: Call, grad: Tensor, u: Tensor, saved: HeadGrads, hint: Tensor, uniform_hint: bool) -> HeadGrads:
    """Exact sums under grad, which is 0 where masked; fresh tensors in the tile's dtype."""
    if uniform_hint and call.mask is None and grad.numel() and grad.stride(0) == 0:
        # An expanded scalar, as sum() and mean() send it: no row deviates and the host need not wait. A row without a
        # distribution (its hint was set to 0) still poisons the sums, as it would in eager code.
        c = grad[0]
        return saved.times(torch.where((hint == 0).any() & (c != 0), torch.nan, c), call.backend)
    c = common_factor(grad, hint)
    expected = c * hint
    deviates, alive = (grad - expected).abs() <= 4 * torch.finfo(grad.dtype).eps * expected.abs(), grad != 0
    deviates.logical_not_()
    kinds = {"narrow": call.products is not None, "jumps": call.spec.jumps}
    found = correction(saved, call.student, u, c, hint, grad, deviates, alive, call.backend, **kinds)
    loop = call.loop(found.rows)
    for chunk in loop.run(grad=True, scores=False):
        if (made := chunk.gradients) is None:
            continue
        through_adapter = loop.student.through_adapter(made.grad_logits)
        first = found.anew and made.first
        sums = (loop.student, made.grad_logits, through_adapter, made.hidden)
        for alpha, weights in found.terms:
            row_weights = weights[made.at].masked_fill(~made.finite, torch.nan)
            found.grads.add(*sums, row_weights, first=first, alpha=alpha, normalised=weights is hint)
    return found.grads


def _backward(grad_value: Tensor, *flat: Any) -> tuple[Tensor, ...]:
    call = Call.unpack(flat[:N_COMMON]).settled()
    u, *saved, hint, dlogits, uniform_hint, hidden_grad, weight_grad, bias_grad, adapter_grad = flat[N_COMMON:]
    student = call.student
    with torch.no_grad(), torch.autocast(grad_value.device.type, enabled=False):
        hidden = u.new_empty(0)
        if call.mask is not None:  # masked rows have no gradient, whatever comes
            grad_value = grad_value.masked_fill(~call.mask, 0.0)
        if hidden_grad:
            hidden = (u * grad_value.unsqueeze(-1)).masked_fill_(grad_value.unsqueeze(-1) == 0, 0.0).to(student.hidden.dtype)
        grads = HeadGrads(*saved)
        if dlogits.numel():
            kinds = Kinds(weight_grad, bias_grad, adapter_grad)
            grads = divergence_gradients(call, dlogits, hint, grad_value, kinds)
        elif grads.wanted:
            grads = _head_grads(call, grad_value, u, grads, hint, uniform_hint)
        tensors = (student.weight, student.bias, student.a, student.b)
        return hidden, *(returned(total, like) for total, like in zip(grads, tensors, strict=True))


for _op, _implementation in (("linear_divergence", _forward), ("linear_divergence_backward", _backward)):
    torch.library.impl(f"topd::{_op}", "CompositeExplicitAutograd", _implementation)


@torch.library.register_fake("topd::linear_divergence")
def _forward_fake(*flat: Any) -> tuple[Tensor, ...]:
    call = Call.unpack(flat[:N_COMMON])
    _, hidden_grad, weight_grad, bias_grad, adapter_grad, keep, scores = flat[N_COMMON:]
    student, n = call.student, call.student.hidden.shape[0]
    value = student.hidden.new_empty(n, dtype=call.dtype)
    keeps = keep and keeps_dlogits(call, weight_grad=weight_grad, scores=scores)
    kinds = {"weight": weight_grad and not keeps, "bias": bias_grad and not keeps, "adapter": adapter_grad and not keeps}
    grads = HeadGrads.empty(student, call.vocab, call.dtype, "", **kinds)
    return (
        value,
        value.new_empty(len(FIELDS) if scores else 0, n),
        value.new_empty((n, student.hidden.shape[1]) if hidden_grad else (0, 0)),
        *grads,
        value.new_empty(n if weight_grad or bias_grad or adapter_grad else 0),
        _dlogits(call._replace(backend=""), keeps=keeps, scores=scores),
    )


@torch.library.register_fake("topd::linear_divergence_backward")
def _backward_fake(grad_value: Tensor, *flat: Any) -> tuple[Tensor, ...]:
    return unfilled_gradients(Call.unpack(flat[:N_COMMON]).student, flat[-4:], grad_value)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, scores, *kept = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(scores, *kept)
    save_call(ctx, inputs, N_COMMON, kept)
    ctx.uniform_hint, ctx.needs = inputs[N_COMMON] is None, inputs[N_COMMON + 1 : N_COMMON + 5]


def _gradient(ctx: Any, grad_value: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad_value is None:
        return at_inputs(ctx, None)
    no_forward_mode("linear_divergence", [grad_value])
    common, kept = saved_call(ctx)
    return at_inputs(ctx, torch.ops.topd.linear_divergence_backward(grad_value, *common, *kept, ctx.uniform_hint, *ctx.needs))


torch.library.register_autograd("topd::linear_divergence", _gradient, setup_context=_setup_context)
refuse_second_derivative("linear_divergence")
