"""Ways to compute one divergence and its gradients, for `topd profile --run`: topd, eager torch, TRL's chunked loss."""

import importlib.util
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from topd.divergences import JSD, Divergence, ForwardKL, ReverseKL
from topd.head import Head
from topd.losses.linear_divergence import linear_divergence

DIVERGENCES: dict[str, Divergence] = {"forward_kl": ForwardKL(), "reverse_kl": ReverseKL(), "jsd": JSD()}
TRL_BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}


class Tensors(NamedTuple):
    """Hidden states [N, H] and weights [V, H] of both sides; the student's hidden states, and its weight where it is trained,
    require grad."""

    student_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor


def random_tensors(n: int, vocab: tuple[int, int], width: tuple[int, int], dtype: torch.dtype, *, trained: bool) -> Tensors:
    """Return random tensors, made in place; vocabulary and width of the student and of the teacher."""
    tensors = []
    for entries, columns in zip(vocab, width, strict=True):
        tensors.append(torch.empty(n, columns, dtype=dtype).normal_())
        tensors.append(torch.empty(entries, columns, dtype=dtype).normal_(0.0, columns**-0.5))
    tensors[0].requires_grad_()
    return Tensors(tensors[0], tensors[1].requires_grad_(trained), *tensors[2:])


def topd_values(tensors: Tensors, loss: str) -> tuple[Tensor, ...]:
    """Return nats [N] by topd."""
    student, teacher = Head(tensors.student_weight), Head(tensors.teacher_weight)
    chosen = DIVERGENCES[loss]
    return (linear_divergence(tensors.student_hidden, student, tensors.teacher_hidden, teacher, divergence=chosen),)


def eager_values(tensors: Tensors, loss: str) -> tuple[Tensor, ...]:
    """Return nats [N] from full logits, and both log-probabilities, which a trainer's loop keeps meanwhile."""
    common = min(len(tensors.student_weight), len(tensors.teacher_weight))
    student = F.log_softmax(F.linear(tensors.student_hidden, tensors.student_weight[:common]).float(), dim=-1)
    with torch.no_grad():
        teacher = F.log_softmax(F.linear(tensors.teacher_hidden, tensors.teacher_weight[:common]).float(), dim=-1)
    return _of_logprobs(student, teacher, loss), student, teacher


def trl_values(tensors: Tensors, loss: str) -> tuple[Tensor, ...]:
    """Return nats [N] by TRL's chunked function, as its trainers call it."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    common = min(len(tensors.student_weight), len(tensors.teacher_weight))
    weights = tensors.student_weight[:common], tensors.teacher_weight[:common]
    own, others = (tensors.student_hidden, weights[0], None), (tensors.teacher_hidden, weights[1], None)
    values, _ = ChunkedDivergenceFunction.apply(*own, *others, TRL_BETA[loss], 1.0)
    return (values,)


# Each returns the values first, then what must live until the gradients are there.
WAYS: dict[str, Callable[[Tensors, str], tuple[Tensor, ...]]] = {"eager": eager_values, "TRL": trl_values, "topd": topd_values}


def value_and_gradients(way: str, tensors: Tensors, loss: str) -> None:
    """Compute the values and the gradients of their mean in one of the ways."""
    values, *kept = WAYS[way](tensors, loss)
    wanted = [tensor for tensor in (tensors.student_hidden, tensors.student_weight) if tensor.requires_grad]
    gradients = torch.autograd.grad(values.mean(), wanted)
    del kept, gradients


def installed() -> list[str]:
    """Return which of them can run here."""
    return [name for name in WAYS if name != "TRL" or importlib.util.find_spec("trl") is not None]


def _of_logprobs(student: Tensor, teacher: Tensor, loss: str) -> Tensor:
    """Return nats [N] by the usual formulas."""
    if loss == "forward_kl":
        return (teacher.exp() * (teacher - student)).sum(-1)
    if loss == "reverse_kl":
        return (student.exp() * (student - teacher)).sum(-1)
    half = math.log(0.5)
    mixture = torch.logaddexp(student + half, teacher + half)
    teacher_part = (teacher.exp() * (teacher - mixture)).sum(-1)
    return 0.5 * teacher_part + 0.5 * (student.exp() * (student - mixture)).sum(-1)
