"""The ways in which a training step computes a divergence: topd, eager torch, TRL's chunked loss. `topd profile --run` measures
them, with the vocabularies of any two models."""

from collections.abc import Callable

import torch
from torch import Tensor

from topd_bench.cases import Inputs
from topd_bench.losses import Workload, divergence_of_logprobs
from topd_bench.peers import eager, ours, trl
from topd_bench.peers.peer import not_installed


def random_inputs(n: int, vocab: tuple[int, int], width: tuple[int, int], dtype: torch.dtype, *, trained: bool) -> Inputs:
    """Return random inputs, made in place; vocabulary and width of the student and of the teacher."""
    tensors = []
    for entries, columns in zip(vocab, width, strict=True):
        tensors.append(torch.empty(n, columns, dtype=dtype).normal_())
        tensors.append(torch.empty(entries, columns, dtype=dtype).normal_(0.0, columns**-0.5))
    student_hidden, student_weight, teacher_hidden, teacher_weight = tensors
    return Inputs(student_hidden.requires_grad_(), student_weight.requires_grad_(trained), teacher_hidden, teacher_weight, None)


def common_weights(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return the student's and the teacher's weight, cut to the tokens that both have."""
    common = min(len(inputs.student_weight), len(inputs.teacher_weight))
    return inputs.student_weight[:common], inputs.teacher_weight[:common]


def topd_values(inputs: Inputs, loss: str) -> tuple[Tensor, ...]:
    """Return nats [N] by topd."""
    return (ours.loss(Workload.of(inputs, loss), None),)


def eager_values(inputs: Inputs, loss: str) -> tuple[Tensor, ...]:
    """Return nats [N] from full logits, and both log-probabilities, which a trainer's loop keeps meanwhile."""
    student_weight, teacher_weight = common_weights(inputs)
    student = eager.logprobs(inputs.student_hidden, student_weight)
    with torch.no_grad():
        teacher = eager.logprobs(inputs.teacher_hidden, teacher_weight)
    return divergence_of_logprobs(student, teacher, loss), student, teacher


def trl_values(inputs: Inputs, loss: str) -> tuple[Tensor, ...]:
    """Return nats [N] by TRL's chunked function."""
    student_weight, teacher_weight = common_weights(inputs)
    return (trl.divergence(inputs.student_hidden, student_weight, inputs.teacher_hidden, teacher_weight, loss),)


# Each returns the values first, then what must live until the gradients are there.
WAYS: dict[str, Callable[[Inputs, str], tuple[Tensor, ...]]] = {"eager": eager_values, "TRL": trl_values, "topd": topd_values}


def value_and_gradients(way: str, inputs: Inputs, loss: str) -> None:
    """Compute the values and the gradients of their mean in one of the ways."""
    values, *kept = WAYS[way](inputs, loss)
    gradients = torch.autograd.grad(values.mean(), inputs.differentiated)
    del kept, gradients


def installed() -> list[str]:
    """Return which of them can run here."""
    return [name for name in WAYS if name != "TRL" or not not_installed("trl", "trl")]
