"""What the loss costs beside the eager loss, on the tensors of a held-out batch: value and gradients, time and memory."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import topd
from topd.branching.prefill import prefill
from topd.cli.memory import peak_mib
from topd.models.decoder import decoder_of
from topd_demo.models import Models

ROUNDS = 3


@dataclass
class LossCost:
    """
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
    """Reverse KL, mean over all tokens, so that there are enough to tell; hidden states and head differentiated."""
    student, teacher = decoder_of(models.student), decoder_of(models.teacher)
    ids, attended = batch["input_ids"], batch["attention_mask"].bool()
    rows = attended[:, 1:] & attended[:, :-1]
    with torch.no_grad():
        student_hidden = prefill(student, ids, attended, cache=False).hidden[:, :-1][rows]
        teacher_hidden = prefill(teacher, ids, attended, cache=False).hidden[:, :-1][rows]
    hidden = student_hidden.detach().requires_grad_()
    weight = student.head.weight.detach().clone().requires_grad_()
    teacher_head = teacher.head.detach()
    contenders: dict[str, Callable[[], Tensor]] = {
        "topd": lambda: topd.linear_divergence(hidden, topd.Head(weight), teacher_hidden, teacher_head).mean(),
        "eager": lambda: eager_loss(hidden, weight, teacher_hidden, teacher_head.weight),
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
    """As it is usually written: full logits, two log-softmaxes, a sum."""
    common = min(student_weight.shape[0], teacher_weight.shape[0])
    student = torch.log_softmax(student_hidden @ student_weight[:common].T, dim=-1)
    teacher = torch.log_softmax(teacher_hidden @ teacher_weight[:common].T, dim=-1)
    return (student.exp() * (student - teacher)).sum(-1).mean()
