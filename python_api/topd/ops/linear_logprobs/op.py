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
from topd.ops.linear_logprobs.gradient import (
    gradients_of_kept,
    gradients_of_sums,
    in_range_share,
    mass,
    upstream_of,
)
from topd.ops.linear_logprobs.ids import add_ids, rows_of_ids, width_of_ids
from topd.ops.linear_logprobs.loop import Loop, keeps_outside_grad
from topd.ops.linear_logprobs.spec import (
    CALL,
    GRADIENTS,
    HEAD_VOCABULARY,
    INPUTS,
    OUTPUTS,
    SAVED,
    UPSTREAMS,
    Call,
    Gradients,
    Inputs,
    Kept,
    Outputs,
    Saved,
    Upstreams,
)
from topd.ops.shared.differentiable import (
    input_gradients,
    refuse_inference_tensors,
    refuse_second_derivative,
    save,
    saved,
    unfilled_gradients,
)
from topd.ops.shared.engines import EAGER, Engine
from topd.ops.shared.few_rows import may_keep
from topd.ops.shared.hidden_sums import HiddenSums
from topd.ops.shared.loop import chosen_rows
from topd.ops.shared.numbers import numbers_in, numbers_of
from topd.ops.shared.one_pass import normalised_hint
from topd.ops.shared.op_body import define, op_body
from topd.ops.shared.tiles import HeadGrads, Needs

define("topd::linear_logprobs", f"({INPUTS.schema}) -> ({OUTPUTS.schema})")
define(
    "topd::linear_logprobs_backward",
    f"({UPSTREAMS.schema}, {SAVED.schema}) -> ({GRADIENTS.schema})",
)


def linear_logprobs(call: Call, weights_hint: Tensor | None, needs: Needs, *, entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probabilities [N, M], entropy [N] (or [0]) and the log of the mass outside the ids [N] of checked operands."""
    numbers = numbers_of(call.spec.temperature)
    if numbers is not None:
        call = call._replace(spec=call.spec._replace(temperature=1.0), numbers=numbers)
    inputs = Inputs(call, weights_hint, needs, may_keep(), entropy)
    logprobs, entropies, outside, *_ = torch.ops.topd.linear_logprobs(*INPUTS.pack(inputs))
    return logprobs, entropies, outside


def _settled(call: Call) -> Call:
    """Return the call with its temperature read from the tensor that holds it inside torch.compile."""
    if call.numbers is None:
        return call
    (temperature,) = numbers_in(call.numbers)
    return call._replace(spec=call.spec._replace(temperature=temperature))


def _empty(inputs: Inputs, *, keeps: bool, engine: Engine) -> Outputs:
    """Return the results before any row is computed: numbers 0, sums and the kept tile uninitialised."""
    call, needs, ids = inputs.call, inputs.needs, inputs.call.ids
    (n, width), like = call.side.hidden.shape, call.side.hidden
    logprobs = like.new_zeros(ids.shape, dtype=call.dtype)
    summed = needs.of_head_if(call.dense and not keeps)
    kept = Kept(
        logprobs.new_zeros((n, width) if needs.hidden else (0, 0)),
        HeadGrads.empty(call.side, call.vocab, call.dtype, engine, summed),
        logprobs.new_zeros((n, width) if needs.hidden and inputs.entropy else (0, 0)),
        logprobs.new_zeros(ids.shape, dtype=torch.bool),
        logprobs.new_zeros(0 if call.spec.softcap is None else n, ids.shape[1]),
        logprobs.new_zeros(n if summed.head else 0),
        engine.buffer((n, call.vocab) if keeps else (0, 0), call.side.weight, call.dtype),
        logprobs.new_zeros((n, of_ids) if (of_ids := width_of_ids(call, needs)) else (0, 0)),
    )
    return Outputs(logprobs, logprobs.new_zeros(n if inputs.entropy else 0), logprobs.new_zeros(n), kept)


def _keeps(inputs: Inputs) -> bool:
    """Tell whether forward keeps a tile of gradients; from shapes and dtypes alone."""
    return inputs.keep and inputs.needs.weight and not inputs.entropy and keeps_outside_grad(inputs.call)


def _forward(*flat: Any) -> tuple[Any, ...]:
    inputs = INPUTS.unpack(*flat)
    call = _settled(inputs.call)
    if any(inputs.needs):
        refuse_inference_tensors(CALL.named_tensors(call))
    with op_body("linear_logprobs", call.side.hidden.device):
        return OUTPUTS.pack(_computed(call, inputs))


def _computed(call: Call, inputs: Inputs) -> Outputs:
    """Return the results of a call whose numbers are settled."""
    needs, keeps = inputs.needs, _keeps(inputs)
    outputs = _empty(inputs, keeps=keeps, engine=call.backend)
    if needs.head and call.dense and not keeps:
        kept = outputs.kept._replace(hint=_hint(call, inputs.weights_hint, outputs.outside))
        outputs = outputs._replace(kept=kept)
    chosen = chosen_rows(call.mask)
    if not call.shard.split:  # else the public function has checked them
        ids = call.ids if chosen is None else call.ids[chosen]
        in_vocabulary("ids", ids, call.vocab, HEAD_VOCABULARY, low=-1 if call.padded else 0)
    _fill(call, inputs, chosen, outputs, keeps=keeps)
    return outputs


def _fill(call: Call, inputs: Inputs, chosen: Tensor | None, outputs: Outputs, *, keeps: bool) -> None:
    """Compute the chosen rows (None: all) into the results, a chunk at a time."""
    needs, kept, shard = inputs.needs, outputs.kept, call.shard
    summed = needs.head and call.dense and not keeps  # also on a rank whose shard is empty, which has no sums
    u, u_entropy, of_ids = (HiddenSums(shard, total) for total in (kept.u, kept.u_entropy, kept.of_ids))
    tile, weight_grad = kept.outside_grad if keeps else None, needs.weight and summed
    loop = Loop(call, chosen, grad=any(needs), weight_grad=weight_grad, entropy=inputs.entropy, product_tile=tile)
    if loop.plan.n == 0:
        kept.grads.zero()
    if keeps:
        kept.outside_grad[loop.plan.n :].zero_()
    for chunk in loop:
        rows, index, side = chunk.rows, chunk.row_index, loop.side
        outputs.logprobs[index], outputs.outside[index], kept.first[index] = rows.logprobs, rows.outside, rows.first
        if inputs.entropy:
            outputs.entropy[index] = rows.entropy
        if call.spec.softcap is not None:
            kept.slope[index] = rows.slope
        if kept.of_ids.numel():
            of_ids.take(rows_of_ids(call, rows, call.ids[index], needs), index)
        if (gradients := chunk.gradients) is None:
            continue
        index, finite = gradients.row_index, gradients.finite
        through_adapter = side.through_adapter(gradients.outside_grad)
        if needs.hidden:
            out = u.place(index, None)
            u.add(side.hidden_grad(gradients.outside_grad, through_adapter, finite, out=out), index, None)
        if needs.hidden and gradients.entropy_grad is not None:
            through_entropy, out = side.through_adapter(gradients.entropy_grad), u_entropy.place(index, None)
            u_entropy.add(side.hidden_grad(gradients.entropy_grad, through_entropy, finite, out=out), index, None)
        if summed:
            if needs.adapter and through_adapter is not None:  # d a is whole on every rank
                through_adapter = shard.summed(through_adapter)
            kept.hint[index] = kept.hint[index].masked_fill(~finite, 0.0)
            weights = (kept.hint[index] * mass(outputs.outside[index])).masked_fill(~finite, 0.0)
            kept.grads.add(side, gradients.outside_grad, through_adapter, gradients.hidden, weights, first=gradients.first)
    for sums in (u, u_entropy, of_ids):
        sums.finish()


def _hint(call: Call, weights_hint: Tensor | None, like: Tensor) -> Tensor:
    """Return the hint [N]: with none, what rows get where every log-probability has one upstream."""
    hint = normalised_hint(weights_hint, call.mask, like)
    if weights_hint is None and (call.padded or like.device.type != "cpu"):
        hint *= in_range_share(call)
    return hint


def _backward(
    grad_logprobs: Tensor | None, grad_entropy: Tensor | None, grad_outside: Tensor | None, *flat: Any
) -> tuple[Any, ...]:
    inputs = SAVED.unpack(*flat)
    inputs = inputs._replace(call=_settled(inputs.call))
    call, kept, needs = inputs.call, inputs.kept, inputs.needs
    upstreams = Upstreams(grad_logprobs, grad_entropy, grad_outside)
    with op_body("linear_logprobs", call.side.hidden.device):
        upstream = upstream_of(upstreams, inputs)
        at_ids = inputs, upstreams, upstream.at_ids, upstream.used
        hidden = kept.u.new_empty(0)
        if needs.hidden:
            hidden = kept.u * upstream.dense.unsqueeze(-1)
            if upstream.entropy is not None:
                hidden.addcmul_(kept.u_entropy, upstream.entropy.unsqueeze(-1))
            hidden.masked_fill_(~upstream.used.unsqueeze(-1), 0.0)
        grads = kept.grads
        if kept.outside_grad.numel():
            add_ids(*at_ids, grads, hidden)  # to d hidden alone: the head's gradients are empty
            grads = gradients_of_kept(inputs, upstream)
        else:
            c = None
            if needs.head:
                grads, c = gradients_of_sums(inputs, upstreams, upstream)
            add_ids(*at_ids, grads, hidden, c)
        return GRADIENTS.pack(Gradients(hidden.to(call.side.hidden.dtype), grads.returned(call.side, needs)))


for _op, _implementation in (("linear_logprobs", _forward), ("linear_logprobs_backward", _backward)):
    torch.library.impl(f"topd::{_op}", "CompositeExplicitAutograd", _implementation)


@torch.library.register_fake("topd::linear_logprobs")
def _forward_fake(*flat: Any) -> tuple[Any, ...]:
    inputs = INPUTS.unpack(*flat)
    return OUTPUTS.pack(_empty(inputs, keeps=_keeps(inputs), engine=EAGER))  # whose buffers are torch's own


@torch.library.register_fake("topd::linear_logprobs_backward")
def _backward_fake(
    grad_logprobs: Tensor | None, grad_entropy: Tensor | None, grad_outside: Tensor | None, *flat: Any
) -> tuple[Any, ...]:
    inputs = SAVED.unpack(*flat)
    return GRADIENTS.pack(Gradients(*unfilled_gradients(inputs.call.side, inputs.needs, inputs.call.dtype)))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    call, weights_hint, needs, _, entropy = INPUTS.unpack(*inputs)
    outputs = OUTPUTS.unpack(*output)
    _, _, _, *kept = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*kept)
    ctx.needs, ctx.entropy = needs, entropy
    save(ctx, SAVED, Saved(call, outputs.logprobs, outputs.outside, outputs.kept, needs, uniform_hint=weights_hint is None))


def _gradient(
    ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, grad_outside: Tensor | None, *_: Any
) -> tuple[Any, ...]:
    upstreams = Upstreams(grad_logprobs, grad_entropy if ctx.entropy else None, grad_outside)
    given = [grad for grad in upstreams if grad is not None]
    if not given:
        return (None,) * len(INPUTS.names)
    no_forward_mode("linear_logprobs", given)
    gradients = torch.ops.topd.linear_logprobs_backward(*upstreams, *saved(ctx))
    return input_gradients(INPUTS, "", ctx.needs, gradients)


torch.library.register_autograd("topd::linear_logprobs", _gradient, setup_context=_setup_context)
refuse_second_derivative("linear_logprobs")
