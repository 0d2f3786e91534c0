"""The floor: the bare matrix products of a loss by torch.mm, on the same tensors."""

import torch
from torch import Tensor

from topd_bench.cases import Inputs
from topd_bench.losses import has_teacher
from topd_bench.timing import Contender


def floor(inputs: Inputs, loss: str) -> dict[str, Tensor]:
    """Compute the products in the inputs' dtype, each result freshly allocated as torch.mm does."""
    products = {}
    with torch.no_grad():
        products["student"] = torch.mm(inputs.student_hidden, inputs.student_weight.T)
        if has_teacher(loss):
            products["teacher"] = torch.mm(inputs.teacher_hidden, inputs.teacher_weight.T)
        products["hidden"] = torch.mm(products["student"], inputs.student_weight)
        if inputs.trainable_head:
            products["weight"] = torch.mm(products["student"].T, inputs.student_hidden)
    return products


def warm_floor(inputs: Inputs, loss: str) -> Contender:
    """Return the same products into buffers that stay allocated: no page is ever faulted in, the strictest floor there is."""
    buffers = floor(inputs, loss)

    def run() -> None:
        student = buffers["student"]
        with torch.no_grad():
            torch.mm(inputs.student_hidden, inputs.student_weight.T, out=student)
            if "teacher" in buffers:
                torch.mm(inputs.teacher_hidden, inputs.teacher_weight.T, out=buffers["teacher"])
            torch.mm(student, inputs.student_weight, out=buffers["hidden"])
            if "weight" in buffers:
                torch.mm(student.T, inputs.student_hidden, out=buffers["weight"])

    return run


def floor_of_scores(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Compute both sides' logits, all that `score_tokens` multiplies."""
    with torch.no_grad():
        student = torch.mm(inputs.student_hidden, inputs.student_weight.T)
        return student, torch.mm(inputs.teacher_hidden, inputs.teacher_weight.T)
