"""The gradients to the student's head: from the sums that forward made, corrected where rows deviate from the hint, or from the
dlogits of few rows."""

import torch
from torch import Tensor

from topd.ops.linear_divergence.loop import Loop
from topd.ops.linear_divergence.spec import Call, Kept
from topd.ops.shared.few_rows import gradients_of_few, kept_rows
from topd.ops.shared.one_pass import common_factor, correction
from topd.ops.shared.tiles import HeadGrads, Needs


def gradients_of_kept(call: Call, kept: Kept, grad: Tensor, needs: Needs) -> HeadGrads:
    """Return the head's gradients under the upstream gradient `grad` [N] from the dlogits of few rows, the chosen ones first.
    The hint of rows without a distribution is 0: their gradient is NaN unless their `grad` is 0."""
    rows = kept_rows(call.mask)
    weights = grad[rows]
    weights = weights.masked_fill((kept.hint[rows] == 0) & (weights != 0), torch.nan)
    dlogits = kept.dlogits[: weights.numel(), : call.vocab]
    hidden = call.student.hidden[rows]
    return gradients_of_few(call.student, dlogits, hidden, weights, needs, call.dtype, call.backend)


def uniform_factor(call: Call, grad: Tensor, *, uniform_hint: bool) -> Tensor | None:
    """Return c where `grad` [N], as it came, is an expanded scalar, as sum() sends it (mean() sends a number each): then no row
    deviates, the host need not wait, and ranks have nothing to tell each other. None where that is not known."""
    is_scalar = uniform_hint and grad.numel() > 0 and grad.stride(0) == 0
    return grad[0] if is_scalar and not call.shard.sequence and (call.mask is None or call.shard.split) else None


def gradients_of_sums(call: Call, kept: Kept, grad: Tensor, needs: Needs, c: Tensor | None) -> HeadGrads:
    """Return exact sums under `grad` [N], which is 0 where masked, and `c` elsewhere if that is not None; fresh tensors in the
    tile's dtype.

    Over the ranks of a sharded head rows are computed again together: those that deviate on any rank. Where the ranks share the
    rows, each one learns what came for all of them, as no rank knows whether the others' rows obey.
    """
    engine, hint, shard = call.backend, kept.hint, call.shard
    if c is not None:  # a row without a distribution (its hint was set to 0) still poisons the sums, as it would in eager code
        lost = hint == 0 if call.mask is None else (hint == 0) & call.mask
        return kept.grads.times(torch.where(lost.any() & (c != 0), torch.nan, c), engine, call.student)
    if shard.sequence:
        own = [call.tokens] if call.tokens is not None and call.spec.hard_weight else []
        grad, hint, *tokens = shard.of_all(grad, hint, *own)
        call = call._replace(tokens=next(iter(tokens), None))
    c = common_factor(grad, hint)
    expected = c * hint
    deviates, alive = (grad - expected).abs() <= 4 * torch.finfo(grad.dtype).eps * expected.abs(), grad != 0
    deviates.logical_not_()
    if not shard.sequence:  # whose ranks have seen all rows
        deviates, alive = shard.union(deviates, alive)
    weight = call.student.weight
    narrow = engine.grad_dtype(weight.dtype, call.dtype, weight.device) != call.dtype
    rows = (c, hint, grad, deviates, alive)
    correct = correction(
        kept.grads,
        call.student,
        kept.u,
        *rows,
        engine,
        narrow=narrow,
        jumps=call.spec.jumps,
        complete=True,
        shard=shard,
    )
    if not correct.rows.numel():
        return correct.grads
    loop = Loop(call, correct.rows, grad=True, weight_grad=needs.weight, scores=False)
    for chunk in loop:
        if (gradients := chunk.gradients) is None:
            continue
        through_adapter = loop.student.through_adapter(gradients.grad_logits)
        if needs.adapter and through_adapter is not None:
            through_adapter = shard.summed(through_adapter)
        first = correct.anew and gradients.first
        sums = (loop.student, gradients.grad_logits, through_adapter, gradients.hidden)
        for alpha, weights in correct.terms:
            row_weights = weights[gradients.row_index].masked_fill(~gradients.finite, torch.nan)
            correct.grads.add(*sums, row_weights, first=first, alpha=alpha, normalised=weights is hint)
    return correct.grads
