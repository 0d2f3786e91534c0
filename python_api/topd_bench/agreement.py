"""Errors of the contenders on the inputs that are timed: a wrong result is never timed.

Values and d hidden are judged on a few rows against fp64, from the inputs on (so the rounding of the matrix products counts,
for everyone alike). d weight, whose truth would need every row in fp64, is judged on a few of its rows against float32 formulas
over all tokens. In 16 bits topd alone is held to a limit: what rounds its logits loses digits of the value, and the table shows
how many.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from topd_bench.losses import Gradients, Targets, Workload, cross_entropy_of_logprobs, divergence_of_logprobs

ROWS, ENTRIES = 8, 256
VOCAB_BLOCK, ROW_BLOCK = 8192, 256
LIMITS = {torch.float32: 1e-3, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Errors:
    """Largest relative error of the value (row by row) and of the gradients (over their largest entry); None: not judged."""

    value: float | None
    hidden: float | None = None
    weight: float | None = None


def few(size: int, count: int, device: torch.device) -> Tensor:
    """Return at most `count` indices below `size`, spread evenly, the first and the last among them."""
    return torch.linspace(0, size - 1, min(count, size)).long().to(device)


def _blocks(tensor: Tensor, size: int) -> list[Tensor]:
    """Return views of at most `size` rows of a tensor."""
    return [tensor[start : start + size] for start in range(0, tensor.shape[0], size)]


def wide_logits(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return [R, V] in a wider dtype, widening the weight a block at a time."""
    return torch.cat([hidden.to(dtype) @ block.to(dtype).T for block in _blocks(weight, VOCAB_BLOCK)], dim=1)


def _of_logits(workload: Workload, student: Tensor, teacher: Tensor | None, rows: Tensor) -> Tensor:
    """Return the loss [R] of some rows from their logits [R, V], by the textbook formula in the logits' dtype."""
    if teacher is not None:
        return divergence_of_logprobs(student.log_softmax(-1), teacher.log_softmax(-1), workload.loss)
    ids, probs = workload.targets
    return cross_entropy_of_logprobs(student.log_softmax(-1), Targets(ids[rows], probs[rows].to(student.dtype)))


@dataclass(frozen=True, eq=False)
class Truth:
    """What is known of a workload's result.

    Attributes:
        rows: [R] those of value [R] and hidden [R, H_s], both fp64.
        entries: [E] those of weight [E, H_s] float32; None: all of them. weight is None where it is not known.
    """

    rows: Tensor
    value: Tensor
    hidden: Tensor
    weight: Tensor | None = None
    entries: Tensor | None = None

    def errors(self, result: Gradients) -> Errors:
        """Judge a contender's result; the value of one that gives the mean alone is not judged."""
        value = ((result.value[self.rows] - self.value) / self.value).abs().max().item() if result.value.dim() else None
        weight = None
        if self.weight is not None and result.weight is not None:
            weight = of_largest(result.weight if self.entries is None else result.weight[self.entries], self.weight)
        return Errors(value, of_largest(result.hidden[self.rows], self.hidden), weight)


def of_largest(result: Tensor, true: Tensor) -> float:
    """Return the largest absolute error over the largest true entry."""
    return float((result.to(true.dtype) - true).abs().max() / true.abs().max())


def truth_of(workload: Workload) -> Truth:
    """Compute value and d mean / d hidden of a few rows in fp64."""
    student_hidden, student_weight, teacher_hidden, teacher_weight = workload.sides
    rows, teacher = few(student_hidden.shape[0], ROWS, student_hidden.device), None
    with torch.no_grad():
        student = wide_logits(student_hidden[rows], student_weight, torch.float64)
        if workload.has_teacher:
            teacher = wide_logits(teacher_hidden[rows], teacher_weight, torch.float64)
    student.requires_grad_()
    value = _of_logits(workload, student, teacher, rows)
    (grad_logits,) = torch.autograd.grad(value.sum() / student_hidden.shape[0], student)
    hidden = torch.zeros(rows.numel(), student_hidden.shape[1], dtype=torch.float64, device=student_hidden.device)
    with torch.no_grad():
        blocks = zip(_blocks(grad_logits.T, VOCAB_BLOCK), _blocks(student_weight, VOCAB_BLOCK), strict=True)
        for grad, weight in blocks:
            hidden.addmm_(grad.T, weight.double())
    return Truth(rows, value.detach(), hidden)


def few_weight_gradients(workload: Workload) -> tuple[Tensor, Tensor]:
    """Compute d mean / d weight [E, H_s] of a few vocabulary entries [E] in float32, all rows counted, a block at a time."""
    student_hidden, student_weight, teacher_hidden, teacher_weight = workload.sides
    n, device = student_hidden.shape[0], student_hidden.device
    entries = few(student_weight.shape[0], ENTRIES, device)
    total = torch.zeros(entries.numel(), student_hidden.shape[1], device=device)
    for rows in torch.arange(n, device=device).split(ROW_BLOCK):
        teacher = None
        with torch.no_grad():
            hidden = student_hidden[rows].float()
            student = wide_logits(hidden, student_weight, torch.float32)
            if workload.has_teacher:
                teacher = wide_logits(teacher_hidden[rows], teacher_weight, torch.float32)
        student.requires_grad_()
        value = _of_logits(workload, student, teacher, rows)
        (grad_logits,) = torch.autograd.grad(value.sum() / n, student)
        total.addmm_(grad_logits[:, entries].T, hidden)
    return entries, total


def whole_truth(workload: Workload) -> Truth:
    """Compute what a contender's value, d hidden and d weight are judged by."""
    truth = truth_of(workload)
    if not workload.inputs.trainable_head:
        return truth
    entries, weight = few_weight_gradients(workload)
    return replace(truth, entries=entries, weight=weight)


def is_wrong(errors: Errors, limits: Errors) -> bool:
    """Tell whether an error that was judged is not below its limit, or is NaN."""
    pairs = ((errors.value, limits.value), (errors.hidden, limits.hidden), (errors.weight, limits.weight))
    return not all(error is None or limit is None or error < limit for error, limit in pairs)


def limits_of(name: str, dtype: torch.dtype) -> Errors:
    """Return what a peer's errors must stay below: in 16 bits topd alone is held to a limit."""
    limit = LIMITS[dtype] if dtype == torch.float32 or name == "ours" else None
    return Errors(limit, limit, limit)
