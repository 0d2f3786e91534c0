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
from topd.ops.linear_divergence.gradient import gradients_of_kept, gradients_of_sums, uniform_factor
from topd.ops.linear_divergence.loop import Loop, keeps_dlogits
from topd.ops.linear_divergence.spec import (
    CALL,
    COMMON_VOCABULARY,
    GRADIENTS,
    INPUTS,
    OUTPUTS,
    SAVED,
    Call,
    Gradients,
    Inputs,
    Kept,
    Outputs,
    Saved,
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
from topd.ops.shared.scaled_rows import scaled_rows
from topd.ops.shared.tiles import HeadGrads, Needs
from topd.scores import FIELDS

define("topd::linear_divergence", f"({INPUTS.schema}) -> ({OUTPUTS.schema})")
define("topd::linear_divergence_backward", f"(Tensor grad_value, {SAVED.schema}) -> ({GRADIENTS.schema})")


def linear_divergence(call: Call, weights_hint: Tensor | None, needs: Needs, *, scores: bool) -> tuple[Tensor, Tensor]:
    """Return value [N] and scores [9, N], or [0, N] without scores, of checked operands."""
    spec = call.spec
    numbers = numbers_of(spec.temperature, spec.parameter, spec.hard_weight)
    if numbers is not None:
        call = call._replace(spec=spec.with_numbers(1.0, 0.0, 0.0), numbers=numbers)
    inputs = Inputs(call, weights_hint, needs, may_keep(), scores)
    value, scores_of_rows, *_ = torch.ops.topd.linear_divergence(*INPUTS.pack(inputs))
    return value, scores_of_rows


def _settled(call: Call) -> Call:
    """Return the call with its spec's numbers read from the tensor that holds them inside torch.compile."""
    return call if call.numbers is None else call._replace(spec=call.spec.with_numbers(*numbers_in(call.numbers)))


def _empty(inputs: Inputs, *, keeps: bool, engine: Engine) -> Outputs:
    """Return the results before any row is computed: values and scores 0, sums and dlogits uninitialised."""
    call, needs = inputs.call, inputs.needs
    student = call.student
    n, width = student.hidden.shape
    value = student.hidden.new_zeros(n, dtype=call.dtype)
    tile = (n, student.weight.shape[0] if inputs.scores else call.vocab) if keeps else (0, 0)
    kept = Kept(
        value.new_zeros((n, width) if needs.hidden else (0, 0)),
        HeadGrads.empty(student, call.vocab, call.dtype, engine, needs.of_head_if(not keeps)),
        value.new_zeros(n if needs.head else 0),
        engine.buffer(tile, student.weight, call.dtype),
    )
    return Outputs(value, value.new_zeros(len(FIELDS) if inputs.scores else 0, n), kept)


def _keeps(inputs: Inputs, device: torch.device | None = None) -> bool:
    """Tell whether forward keeps dlogits; from shapes and dtypes alone."""
    return inputs.keep and inputs.needs.weight and keeps_dlogits(inputs.call, scores=inputs.scores, device=device)


def outline(inputs: Inputs, device: torch.device | None = None) -> Outputs:
    """Return the results of operands without data, on the meta device or in a trace; `device`: where they will be computed."""
    return _empty(inputs, keeps=_keeps(inputs, device), engine=EAGER)  # whose buffers are torch's own


def _forward(*flat: Any) -> tuple[Any, ...]:
    inputs = INPUTS.unpack(*flat)
    call = _settled(inputs.call)
    if any(inputs.needs):
        refuse_inference_tensors(CALL.named_tensors(call))
    with op_body("linear_divergence", call.student.hidden.device):
        return OUTPUTS.pack(_computed(call, inputs))


def _computed(call: Call, inputs: Inputs) -> Outputs:
    """Return the results of a call whose numbers are settled."""
    needs, keeps, shard = inputs.needs, _keeps(inputs), call.shard
    outputs = _empty(inputs, keeps=keeps, engine=call.backend)
    if shard.sequence:
        return _of_sequence(call, inputs, outputs)
    chosen = chosen_rows(call.mask)
    if call.tokens is not None and not shard.split:  # else the public function has checked them
        in_vocabulary("tokens", call.tokens if chosen is None else call.tokens[chosen], call.vocab, COMMON_VOCABULARY)
    if needs.head and not keeps:
        hint = normalised_hint(inputs.weights_hint, call.mask, outputs.value)
        outputs = outputs._replace(kept=outputs.kept._replace(hint=hint))
    _fill(call, inputs, chosen, outputs, keeps=keeps)
    return outputs


def _of_sequence(call: Call, inputs: Inputs, outputs: Outputs) -> Outputs:
    """Return the results for this rank's rows, where the ranks share the rows: all but the hidden states and u is computed for
    the whole sequence on every rank."""
    shard, n = call.shard, call.student.hidden.shape[0]
    own = shard.own(n)
    columns = call.mask, call.tokens, inputs.weights_hint
    everyone = iter(shard.of_all(*(column for column in columns if column is not None)))
    mask, tokens, hint = (None if column is None else next(everyone) for column in columns)
    value = outputs.value.new_zeros(n * shard.ranks)
    scores = value.new_zeros(outputs.scores.shape[0], value.numel())
    hint = normalised_hint(hint, mask, value) if inputs.needs.head else outputs.kept.hint
    chosen = chosen_rows(mask)
    if chosen is None:
        chosen = torch.arange(value.numel(), device=value.device)
    whole = outputs._replace(value=value, scores=scores, kept=outputs.kept._replace(hint=hint))
    _fill(call._replace(tokens=tokens), inputs, chosen, whole, keeps=False)
    return Outputs(value[own].clone(), scores[:, own].clone(), whole.kept._replace(hint=hint[own].clone()))


def _fill(call: Call, inputs: Inputs, chosen: Tensor | None, outputs: Outputs, *, keeps: bool) -> None:
    """Compute the chosen rows (None: all) into the results, a chunk at a time."""
    needs, shard = inputs.needs, call.shard
    value, scores, (u, grads, hint, dlogits) = outputs.value, outputs.scores, outputs.kept
    grad = any(needs)
    summed = needs.head and not keeps  # also on a rank whose shard is empty, which has no sums
    hidden_sums = HiddenSums(shard, u)
    tile = dlogits if keeps else None
    loop = Loop(call, chosen, grad=grad, weight_grad=needs.weight, scores=inputs.scores, student_tile=tile)
    if loop.plan.n == 0:
        grads.zero()
    if keeps:
        dlogits[loop.plan.n :].zero_()
    for chunk in loop:
        value[chunk.row_index] = chunk.rows.value
        if inputs.scores:
            scores[:, chunk.row_index] = chunk.rows.scores
        if (gradients := chunk.gradients) is None:
            continue
        index, finite, piece = gradients.row_index, gradients.finite, gradients.piece
        through_adapter = loop.student.through_adapter(gradients.grad_logits)
        if needs.hidden:
            out = hidden_sums.place(index, piece)
            part = loop.student.hidden_grad(gradients.grad_logits, through_adapter, finite, out=out)
            hidden_sums.add(part, index, piece)
        if keeps:
            hint[index] = finite.to(hint.dtype)
        if summed:
            if needs.adapter and through_adapter is not None:  # d a is whole on every rank
                through_adapter = shard.summed(through_adapter)
            weights = hint[index].masked_fill(~finite, 0.0)
            hint[index] = weights
            sums = (loop.student, gradients.grad_logits, through_adapter, gradients.hidden, weights)
            grads.add(*sums, first=gradients.first, normalised=True)
    hidden_sums.finish()


def _backward(grad_value: Tensor, *flat: Any) -> tuple[Any, ...]:
    call, kept, needs, uniform_hint = SAVED.unpack(*flat)
    call, student = _settled(call), call.student
    with op_body("linear_divergence", grad_value.device):
        hidden = student.hidden.new_empty(0)
        c = uniform_factor(call, grad_value, uniform_hint=uniform_hint)
        if call.mask is not None:  # masked rows have no gradient, whatever comes
            grad_value = grad_value.masked_fill(~call.mask, 0.0)
        if needs.hidden:
            hidden = scaled_rows(call.backend, kept.u, grad_value, student.hidden.dtype)
        grads = kept.grads
        if kept.dlogits.numel():
            grads = gradients_of_kept(call, kept, grad_value, needs)
        elif needs.head:
            grads = gradients_of_sums(call, kept, grad_value, needs, c)
        return GRADIENTS.pack(Gradients(hidden, grads.returned(student, needs)))


for _op, _implementation in (("linear_divergence", _forward), ("linear_divergence_backward", _backward)):
    torch.library.impl(f"topd::{_op}", "CompositeExplicitAutograd", _implementation)


@torch.library.register_fake("topd::linear_divergence")
def _forward_fake(*flat: Any) -> tuple[Any, ...]:
    return OUTPUTS.pack(outline(INPUTS.unpack(*flat)))


@torch.library.register_fake("topd::linear_divergence_backward")
def _backward_fake(grad_value: Tensor, *flat: Any) -> tuple[Any, ...]:
    inputs = SAVED.unpack(*flat)
    return GRADIENTS.pack(Gradients(*unfilled_gradients(inputs.call.student, inputs.needs, inputs.call.dtype)))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    call, weights_hint, needs, _, _ = INPUTS.unpack(*inputs)
    outputs = OUTPUTS.unpack(*output)
    ctx.set_materialize_grads(False)
    _, scores, *kept = output
    ctx.mark_non_differentiable(scores, *kept)
    ctx.needs = needs
    save(ctx, SAVED, Saved(call, outputs.kept, needs, uniform_hint=weights_hint is None))


def _gradient(ctx: Any, grad_value: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad_value is None:
        return (None,) * len(INPUTS.names)
    no_forward_mode("linear_divergence", [grad_value])
    gradients = torch.ops.topd.linear_divergence_backward(grad_value, *saved(ctx))
    return input_gradients(INPUTS, "student_", ctx.needs, gradients)


torch.library.register_autograd("topd::linear_divergence", _gradient, setup_context=_setup_context)
refuse_second_derivative("linear_divergence")
