"""Errors of the contenders on the inputs that are timed: a wrong result is never timed.

Values and d hidden are judged on a few rows against fp64, from the inputs on (so the rounding of the matrix products counts,
for everyone alike); d weight, whose truth would need every row in fp64, against eager's on the same inputs in float32. In
bfloat16 topd alone is held to a limit: what rounds its logits loses digits of the value, and the table shows how many.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.cases import Inputs
from bench.logprob_peers import loss_of_logits
from bench.peers import Gradients, differentiable, divergence_of_logprobs, has_teacher

ROWS = 8
VOCAB_BLOCK = 8192
LIMITS = {torch.float32: 1e-3, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Errors:
    """Largest relative error of the value (row by row) and of the gradients (over their largest entry).

    weight is None where there is no d weight, and for the yardstick itself.
    """

    value: float
    hidden: float
    weight: float | None


class DisagreementError(RuntimeError):
    """A contender's result is wrong, so its time would mean nothing."""


def _vocab_blocks(tensor: Tensor) -> list[Tensor]:
    """Views of at most VOCAB_BLOCK rows of [V, ...]."""
    return [tensor[start : start + VOCAB_BLOCK] for start in range(0, tensor.shape[0], VOCAB_BLOCK)]


def _double_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """[R, V] in fp64, widening the weight a block at a time."""
    return torch.cat([hidden.double() @ block.double().T for block in _vocab_blocks(weight)], dim=1)


def truth(inputs: Inputs, loss: str, rows: Tensor) -> tuple[Tensor, Tensor]:
    """fp64 value [R] and d mean / d hidden [R, H_s] of the chosen rows."""
    with torch.no_grad():
        student = _double_logits(inputs.student_hidden[rows], inputs.student_weight)
    student.requires_grad_()
    if has_teacher(loss):
        with torch.no_grad():
            teacher = _double_logits(inputs.teacher_hidden[rows], inputs.teacher_weight).log_softmax(-1)
        value = divergence_of_logprobs(student.log_softmax(-1), teacher, loss)
    else:
        value = loss_of_logits(inputs, loss, rows, student)
    (grad_logits,) = torch.autograd.grad(value.sum() / inputs.student_hidden.shape[0], student)
    hidden = torch.zeros(rows.numel(), inputs.student_hidden.shape[1], dtype=torch.float64)
    with torch.no_grad():
        blocks = zip(_vocab_blocks(grad_logits.T), _vocab_blocks(inputs.student_weight), strict=True)
        for grad, weight in blocks:
            hidden.addmm_(grad.T, weight.double())
    return value.detach(), hidden


def _of_largest(found: Tensor, true: Tensor) -> float:
    """Largest absolute error over the largest true entry."""
    return float((found - true).abs().max() / true.abs().max())


def measure_errors(inputs: Inputs, loss: str, results: Mapping[str, Gradients]) -> dict[str, Errors]:
    """Errors by contender; the yardstick of d weight is eager on float32 inputs, `results["eager"]` where they are that."""
    n = inputs.student_hidden.shape[0]
    rows = torch.linspace(0, n - 1, min(ROWS, n)).long()
    true_value, true_hidden = truth(inputs, loss, rows)
    narrow = inputs.student_hidden.dtype != torch.float32
    yardstick = differentiable(inputs.to(torch.float32), loss, "eager")["eager"]() if narrow else results["eager"]
    true_weight = yardstick.weight
    errors = {}
    for name, result in results.items():
        weight = None
        if result is not yardstick and result.weight is not None and true_weight is not None:
            weight = _of_largest(result.weight, true_weight)
        value = float(((result.value[rows] - true_value) / true_value).abs().max())
        errors[name] = Errors(value, _of_largest(result.hidden[rows], true_hidden), weight)
    return errors


def refuse_wrong(errors: Mapping[str, Errors], dtype: torch.dtype) -> None:
    """Raise `DisagreementError` where an error is not below the dtype's limit (or is NaN)."""
    limit = LIMITS[dtype]
    for name, error in errors.items():
        held = dtype == torch.float32 or name == "ours"
        if held and not all(part is None or part < limit for part in (error.value, error.hidden, error.weight)):
            raise DisagreementError(f"{name} is off by more than {limit:g}: {error}; nothing was timed")
