"""What the loss costs beside the eager loss, on the tensors of a held-out batch: value and gradients, time and memory."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import topd
from topd.memory import peak_mib
from topd_demo.models import Models

ROUNDS = 3


@dataclass
class LossCost:
    """What both losses cost.

    Attributes:
        tokens, vocab: the batch's tokens, those of the prompts too, and the vocabulary's size.
        seconds, eager_seconds: of value and gradients, medians of interleaved rounds.
        peak_mib, eager_peak_mib: beyond what stood before; None where the system does not say.
        difference: between the two losses, relative.
    """

    tokens: int
    vocab: int
    seconds: float
    eager_seconds: float
    peak_mib: float | None
    eager_peak_mib: float | None
    difference: float


def measure_loss(models: Models, batch: dict[str, Any]) -> LossCost:
    """Measure reverse KL, the mean over all tokens, so that there are enough to tell; hidden states and head are
    differentiated."""
    ids, attended = batch["input_ids"], batch["attention_mask"].bool()
    rows = attended[:, 1:] & attended[:, :-1]
    with torch.no_grad():
        student_hidden, student = topd.hidden_states(models.student, ids, attended)
        teacher_hidden, teacher = topd.hidden_states(models.teacher, ids, attended)
    hidden = student_hidden[:, :-1][rows].requires_grad_()
    weight = student.weight.detach().clone().requires_grad_()
    constant, teacher = teacher_hidden[:, :-1][rows], teacher.detach()
    contenders: dict[str, Callable[[], Tensor]] = {
        "topd": lambda: topd.linear_divergence(hidden, topd.Head(weight), constant, teacher).mean(),
        "eager": lambda: eager_loss(hidden, weight, constant, teacher.weight),
    }
    values: dict[str, float] = {}
    peaks: dict[str, float | None] = {}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for place in range(ROUNDS + 1):
        for name, loss in contenders.items():
            hidden.grad = weight.grad = None
            with peak_mib(hidden.device) as peak:
                start = time.perf_counter()
                value = loss()
                value.backward()
                values[name] = value.item()
                if weight.is_cuda:
                    torch.cuda.synchronize(weight.device)
                end = time.perf_counter()
                peaks[name] = peak()
            if place:
                seconds[name].append(end - start)
    times = {name: statistics.median(each) for name, each in seconds.items()}
    difference = abs(values["topd"] - values["eager"]) / max(abs(values["eager"]), 1e-30)
    sizes = int(rows.sum()), weight.shape[0]
    return LossCost(*sizes, times["topd"], times["eager"], peaks["topd"], peaks["eager"], difference)


def eager_loss(student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
    """Return the loss as it is usually written: full logits, two log-softmaxes, a sum."""
    common = min(student_weight.shape[0], teacher_weight.shape[0])
    student = torch.log_softmax(student_hidden @ student_weight[:common].T, dim=-1)
    teacher = torch.log_softmax(teacher_hidden @ teacher_weight[:common].T, dim=-1)
    return (student.exp() * (student - teacher)).sum(-1).mean()
