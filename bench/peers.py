"""What is compared: topd, eager log-softmax code, TRL's chunked divergence, and the floor of bare matrix products.

Each contender takes the same `Inputs` and gives per-token values and the gradients of their mean over tokens. JSD is
beta KL(p_T || m) + (1 - beta) KL(p_S || m) with m = (1 - beta) p_S + beta p_T and beta = 0.5 everywhere.
"""

import importlib.metadata
import importlib.util
import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import topd
from bench import logprob_peers
from bench.cases import Inputs
from topd.divergences import BY_NAME
from topd.options import BackendName

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")
LOSSES = (*DIVERGENCES, *logprob_peers.CHOSEN)
JSD_BETA = 0.5
TRL_BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": JSD_BETA}


class Gradients(NamedTuple):
    """value [N] in nats, and the gradients of value.mean(): hidden [N, H_s], weight [V, H_s] or None (frozen head)."""

    value: Tensor
    hidden: Tensor
    weight: Tensor | None


Contender = Callable[[], object]
Differentiable = Callable[[], Gradients]


def gradients_of_mean(value: Tensor, inputs: Inputs) -> Gradients:
    """Differentiate the mean over tokens into fresh tensors."""
    hidden, *weight = torch.autograd.grad(value.mean(), inputs.differentiated)
    return Gradients(value.detach(), hidden, weight[0] if weight else None)


def divergence_of_logprobs(student: Tensor, teacher: Tensor, divergence: str) -> Tensor:
    """The usual formula, sum p (log p - log q), from log-probabilities [N, V] to nats [N]."""
    if divergence == "forward_kl":
        return (teacher.exp() * (teacher - student)).sum(-1)
    if divergence == "reverse_kl":
        return (student.exp() * (student - teacher)).sum(-1)
    if divergence == "jsd":
        mixture = torch.logaddexp(student + math.log(1 - JSD_BETA), teacher + math.log(JSD_BETA))
        teacher_part = (teacher.exp() * (teacher - mixture)).sum(-1)
        return JSD_BETA * teacher_part + (1 - JSD_BETA) * (student.exp() * (student - mixture)).sum(-1)
    raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, got {divergence!r}")


def ours(inputs: Inputs, divergence: str, backend: BackendName | None) -> Gradients:
    """topd.linear_divergence."""
    value = topd.linear_divergence(
        inputs.student_hidden,
        topd.Head(inputs.student_weight),
        inputs.teacher_hidden,
        topd.Head(inputs.teacher_weight),
        divergence=BY_NAME[divergence],
        workspace_bytes=inputs.workspace_bytes,
        backend=backend,
    )
    assert isinstance(value, Tensor)
    return gradients_of_mean(value, inputs)


def eager(inputs: Inputs, divergence: str) -> Gradients:
    """Full logits, log_softmax in float32, the usual formula, autograd."""
    student = F.log_softmax(F.linear(inputs.student_hidden, inputs.student_weight).float(), dim=-1)
    with torch.no_grad():
        teacher = F.log_softmax(F.linear(inputs.teacher_hidden, inputs.teacher_weight).float(), dim=-1)
    return gradients_of_mean(divergence_of_logprobs(student, teacher, divergence), inputs)


@cache
def _trl_divergence() -> Any:
    """TRL's autograd function; imported late, since the import takes seconds and pulls in transformers."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    return ChunkedDivergenceFunction


def trl_version() -> str | None:
    """The installed TRL, or None."""
    return importlib.metadata.version("trl") if importlib.util.find_spec("trl") else None


def trl_value(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, divergence: str
) -> Tensor:
    """TRL's per-token divergence [N], nats at temperature 1; its second output, the student's entropy, is dropped.

    Its beta names the divergence: 0 the forward KL, 1 the reverse KL, between them the JSD with our mixture.
    """
    sides = (student_hidden, student_weight, None, teacher_hidden, teacher_weight, None)
    value, _ = _trl_divergence().apply(*sides, TRL_BETA[divergence], 1.0)
    assert isinstance(value, Tensor)
    return value


def trl(inputs: Inputs, divergence: str) -> Gradients:
    """TRL's chunked divergence; on a CPU its fallback in torch."""
    sides = (inputs.student_hidden, inputs.student_weight, inputs.teacher_hidden, inputs.teacher_weight)
    return gradients_of_mean(trl_value(*sides, divergence), inputs)


def has_teacher(loss: str) -> bool:
    return loss in DIVERGENCES


def floor(inputs: Inputs, loss: str) -> dict[str, Tensor]:
    """The bare matrix products in the inputs' dtype, each result freshly allocated as torch.mm does."""
    found = {}
    with torch.no_grad():
        found["student"] = torch.mm(inputs.student_hidden, inputs.student_weight.T)
        if has_teacher(loss):
            found["teacher"] = torch.mm(inputs.teacher_hidden, inputs.teacher_weight.T)
        found["hidden"] = torch.mm(found["student"], inputs.student_weight)
        if inputs.trainable_head:
            found["weight"] = torch.mm(found["student"].T, inputs.student_hidden)
    return found


def warm_floor(inputs: Inputs, loss: str) -> Contender:
    """The same products into buffers that stay allocated: no page is ever faulted in, the strictest floor there is."""
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


def differentiable(inputs: Inputs, loss: str, backend: BackendName | None) -> dict[str, Differentiable]:
    """The contenders that compute a loss and its gradients, by name; without TRL or Liger where they are not installed."""
    if not has_teacher(loss):
        return {
            name: partial(_gradients_of_loss, run, inputs) for name, run in logprob_peers.losses(inputs, loss, backend).items()
        }
    found: dict[str, Differentiable] = {
        "ours": partial(ours, inputs, loss, backend),
        "eager": partial(eager, inputs, loss),
    }
    if trl_version():
        found["trl"] = partial(trl, inputs, loss)
    return found


def _gradients_of_loss(loss: Callable[[], Tensor], inputs: Inputs) -> Gradients:
    return gradients_of_mean(loss(), inputs)
