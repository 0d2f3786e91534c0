"""topd::linear_logprobs: log-probabilities of chosen tokens from hidden states and a head, gradients made in the same pass.

The gradient of a row is D outside_grad + (M numbers at the ids) + h entropy_grad (`topd.ops.linear_logprobs.eager`), D linear
in the upstreams. Forward keeps u = d outside / d hidden of each row, and sums the head's part of it under the weights hint q.
Backward is D u plus M gathered rows of the weight; for the head it takes c with D = c hint q, computes the rows that deviate
again, and scatters M rows. The entropy's part of d hidden is kept as a second u; its part of the head is computed again for the
rows that use it.

Precision: tiles, u and the head's gradients are float32 (float64 for float64), a row's few numbers are computed in double.
Cost: 3 matrix products (2 with a frozen head), 2 more for each row that deviates, 1 + 2 for each row whose entropy is
differentiated.
"""

from typing import Any

import torch
from torch import Tensor

from topd.checks.values import in_vocabulary, no_forward_mode
from topd.ops.linear_logprobs.eager import HEAD_VOCABULARY
from topd.ops.linear_logprobs.gradient import (
    add_ids,
    add_rows,
    dense_correction,
    in_range_share,
    mass,
    uniform_factor,
    upstream_of,
)
from topd.ops.linear_logprobs.loop import Call
from topd.ops.shared.advise_huge_pages import buffer
from topd.ops.shared.few_rows import Kinds, keeps_outside_grad, logprob_gradients
from topd.ops.shared.one_pass import (
    at_inputs,
    chosen_rows,
    normalised_hint,
    refuse_inference_tensors,
    refuse_second_derivative,
    returned,
    save_call,
    saved_call,
    unfilled_gradients,
)
from topd.ops.shared.tiles import HeadGrads

_COMMON = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor? a, Tensor? b, float scaling, Tensor? mask, Tensor ids, "
    "float scale, float? softcap, float temperature, int? workspace_bytes, str backend, bool padded, bool dense, "
    "Tensor? numbers, "
)
_NEEDS = "bool hidden_grad, bool weight_grad, bool bias_grad, bool adapter_grad"
_HEAD_GRADS = "Tensor weight, Tensor bias, Tensor a, Tensor b"
_KEPT = (
    "Tensor logprobs, Tensor outside, Tensor u, Tensor weight_sum, Tensor bias_sum, Tensor a_sum, Tensor b_sum, "
    "Tensor u_entropy, Tensor first, Tensor slope, Tensor hint, Tensor outside_grad"
)
N_COMMON = 16

torch.library.define(
    "topd::linear_logprobs",
    f"({_COMMON}Tensor? weights_hint, {_NEEDS}, bool keep, bool entropy) -> "
    f"(Tensor logprobs, Tensor entropy, Tensor outside, Tensor u, {_HEAD_GRADS}, Tensor u_entropy, Tensor first, Tensor slope, "
    "Tensor hint, Tensor outside_grad)",
)
torch.library.define(
    "topd::linear_logprobs_backward",
    f"(Tensor? grad_logprobs, Tensor? grad_entropy, Tensor? grad_outside, {_COMMON}{_KEPT}, bool uniform_hint, {_NEEDS}) -> "
    f"(Tensor hidden, {_HEAD_GRADS})",
)


def _forward(*flat: Any) -> tuple[Tensor, ...]:
    call = Call.unpack(flat[:N_COMMON]).settled()
    hint, hidden_grad, weight_grad, bias_grad, adapter_grad, keep, entropy = flat[N_COMMON:]
    if hidden_grad or weight_grad or bias_grad or adapter_grad:
        refuse_inference_tensors("linear_logprobs", flat[:N_COMMON])
    (n, width), device = call.side.hidden.shape, call.side.hidden.device
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        logprobs = torch.zeros(call.ids.shape, dtype=call.dtype, device=device)
        entropies, outside = logprobs.new_zeros(n if entropy else 0), logprobs.new_zeros(n)
        first = torch.zeros(call.ids.shape, dtype=torch.bool, device=device)
        slope = logprobs.new_zeros(0 if call.spec.softcap is None else n, call.ids.shape[1])
        u = logprobs.new_zeros((n, width) if hidden_grad else (0, 0))
        u_entropy = logprobs.new_zeros((n, width) if hidden_grad and entropy else (0, 0))
        keeps = keep and keeps_outside_grad(call, weight_grad=weight_grad, entropy=entropy)
        outside_grad = _outside_grad(call, keeps=keeps)
        summed = call.dense and not keeps
        grads = call.head_grads(weight=weight_grad and summed, bias=bias_grad and summed, adapter=adapter_grad and summed)
        used_hint = logprobs.new_empty(0)
        if grads.wanted:
            used_hint = normalised_hint(hint, call.mask, outside)
            if hint is None and (call.padded or device.type != "cpu"):
                used_hint *= in_range_share(call)
        chosen = chosen_rows(call.mask)
        ids = call.ids if chosen is None else call.ids[chosen]
        in_vocabulary("ids", ids, call.vocab, HEAD_VOCABULARY, low=-1 if call.padded else 0)
        side = call.widened()
        if ids.shape[0] == 0:
            grads.zero()
        if keeps:
            outside_grad[ids.shape[0] :].zero_()
        tile = outside_grad if keeps else None
        for chunk in call.run(side, chosen, grad=hidden_grad or grads.wanted or keeps, entropy=entropy, product_tile=tile):
            rows, at = chunk.rows, chunk.at
            logprobs[at], outside[at], first[at] = rows.logprobs, rows.outside, rows.first
            if entropy:
                entropies[at] = rows.entropy
            if slope.shape[0]:
                slope[at] = rows.slope
            if rows.outside_grad is None:
                continue
            through_adapter = side.through_adapter(rows.outside_grad)
            if hidden_grad:
                u[at] = side.hidden_grad(rows.outside_grad, through_adapter, rows.finite)
            if hidden_grad and rows.entropy_grad is not None:
                u_entropy[at] = side.hidden_grad(rows.entropy_grad, side.through_adapter(rows.entropy_grad), rows.finite)
            if grads.wanted:
                used_hint[at] = used_hint[at].masked_fill(~rows.finite, 0.0)
                weights = (used_hint[at] * mass(rows.outside)).masked_fill(~rows.finite, 0.0)
                grads.add(side, rows.outside_grad, through_adapter, chunk.hidden, weights, first=chunk.start == 0)
        return logprobs, entropies, outside, u, *grads, u_entropy, first, slope, used_hint, outside_grad


def _outside_grad(call: Call, *, keeps: bool) -> Tensor:
    """The tile that forward leaves for backward, uninitialised; empty where none is kept."""
    shape = (call.side.hidden.shape[0], call.vocab) if keeps else (0, 0)
    return buffer(shape, call.side.weight, call.dtype, call.backend)


def _backward(*flat: Any) -> tuple[Tensor, ...]:
    call = Call.unpack(flat[3 : 3 + N_COMMON]).settled()
    logprobs, outside, u, *saved_grads, u_entropy, first, slope, hint, outside_grad = flat[3 + N_COMMON : 15 + N_COMMON]
    uniform_hint, hidden_grad, *head_needs = flat[15 + N_COMMON :]
    saved, side = HeadGrads(*saved_grads), call.side
    kinds = Kinds(*head_needs)
    with torch.no_grad(), torch.autocast(logprobs.device.type, enabled=False):
        upstream = upstream_of(call, flat[:3], logprobs, outside, first, slope)
        hidden = u.new_empty(0)
        if hidden_grad:
            hidden = u * upstream.dense.unsqueeze(-1)
            if upstream.entropy is not None:
                hidden.addcmul_(u_entropy, upstream.entropy.unsqueeze(-1))
            hidden.masked_fill_(~upstream.used.unsqueeze(-1), 0.0)
        grads = saved
        if outside_grad.numel():
            add_ids(call, upstream, grads, hidden)  # to d hidden alone: the head's gradients are empty
            grads = logprob_gradients(call, outside_grad, outside, upstream, kinds)
        elif any(kinds):
            c = uniform_factor(call, flat[:3], outside) if uniform_hint else None
            if c is not None:
                grads = saved.times(c, call.backend)
            else:
                shapes = saved if call.dense else call.head_grads(**kinds._asdict())
                found = dense_correction(call, upstream, saved, mass(outside), hint, shapes)
                grads = found.grads
                add_rows(call, upstream, found)
        if not outside_grad.numel():
            add_ids(call, upstream, grads, hidden)
        tensors = (side.weight, side.bias, side.a, side.b)
        heads = (returned(total, like) for total, like in zip(grads, tensors, strict=True))
        return hidden.to(side.hidden.dtype), *heads


for _op, _implementation in (("linear_logprobs", _forward), ("linear_logprobs_backward", _backward)):
    torch.library.impl(f"topd::{_op}", "CompositeExplicitAutograd", _implementation)


@torch.library.register_fake("topd::linear_logprobs")
def _forward_fake(*flat: Any) -> tuple[Tensor, ...]:
    call = Call.unpack(flat[:N_COMMON])
    _, hidden_grad, weight_grad, bias_grad, adapter_grad, keep, entropy = flat[N_COMMON:]
    keeps = keep and keeps_outside_grad(call, weight_grad=weight_grad, entropy=entropy)
    call = call._replace(backend="")
    (n, width), ids, summed = call.side.hidden.shape, call.ids, call.dense and not keeps
    logprobs = call.side.hidden.new_empty(ids.shape, dtype=call.dtype)
    grads = call.head_grads(weight=weight_grad and summed, bias=bias_grad and summed, adapter=adapter_grad and summed)
    return (
        logprobs,
        logprobs.new_empty(n if entropy else 0),
        logprobs.new_empty(n),
        logprobs.new_empty((n, width) if hidden_grad else (0, 0)),
        *grads,
        logprobs.new_empty((n, width) if hidden_grad and entropy else (0, 0)),
        logprobs.new_empty(ids.shape, dtype=torch.bool),
        logprobs.new_empty(0 if call.spec.softcap is None else n, ids.shape[1]),
        logprobs.new_empty(n if summed and (weight_grad or bias_grad or adapter_grad) else 0),
        _outside_grad(call, keeps=keeps),
    )


@torch.library.register_fake("topd::linear_logprobs_backward")
def _backward_fake(*flat: Any) -> tuple[Tensor, ...]:
    side = Call.unpack(flat[3 : 3 + N_COMMON]).side
    return unfilled_gradients(side, flat[-4:], side.hidden)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logprobs, _, outside, *kept = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*kept)
    save_call(ctx, inputs, N_COMMON, (logprobs, outside, *kept))
    ctx.uniform_hint, ctx.entropy = inputs[N_COMMON] is None, inputs[-1]
    ctx.needs = inputs[N_COMMON + 1 : N_COMMON + 5]


def _gradient(
    ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, grad_outside: Tensor | None, *_: Any
) -> tuple[Any, ...]:
    upstream = (grad_logprobs, grad_entropy if ctx.entropy else None, grad_outside)
    if all(grad is None for grad in upstream):
        return at_inputs(ctx, None)
    no_forward_mode("linear_logprobs", [grad for grad in upstream if grad is not None])
    common, kept = saved_call(ctx)
    return at_inputs(ctx, torch.ops.topd.linear_logprobs_backward(*upstream, *common, *kept, ctx.uniform_hint, *ctx.needs))


torch.library.register_autograd("topd::linear_logprobs", _gradient, setup_context=_setup_context)
refuse_second_derivative("linear_logprobs")
