"""The losses that are timed: their names, what beside the inputs they need, and their textbook formulas.

The divergences are taken of the student and the teacher. "logprobs_1" is the cross-entropy of a random token a row,
"logprobs_50" the cross-entropy to random targets over 50 tokens of each row: both without a teacher. JSD is
beta KL(p_T || m) + (1 - beta) KL(p_S || m) with m = (1 - beta) p_S + beta p_T and beta = 0.5.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from topd_bench.cases import Inputs, zipf_ids

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")
CHOSEN = {"logprobs_1": 1, "logprobs_50": 50}
LOSSES = (*DIVERGENCES, *CHOSEN)
JSD_BETA = 0.5


def has_teacher(loss: str) -> bool:
    return loss in DIVERGENCES


class Targets(NamedTuple):
    """ids [N, M], and the weights of their log-probabilities [N, M] float32. Both are empty for a divergence."""

    ids: Tensor
    probs: Tensor


def make_targets(inputs: Inputs, loss: str) -> Targets:
    """Return random targets on the inputs' device; the same for the same number of rows and vocabulary."""
    if has_teacher(loss):
        return Targets(torch.empty(0, 0, dtype=torch.int64, device=inputs.device), torch.empty(0, 0, device=inputs.device))
    generator = torch.Generator().manual_seed(1)
    shape = (inputs.rows, CHOSEN[loss])
    ids = zipf_ids(inputs.rows, inputs.student_weight.shape[0], CHOSEN[loss], generator)
    probs = torch.randn(shape, generator=generator).softmax(-1)
    return Targets(ids.to(inputs.device), probs.to(inputs.device))


@dataclass(frozen=True, eq=False)
class Workload:
    """What every contender of a line computes: one loss of one set of inputs, and the gradients of its mean."""

    inputs: Inputs
    loss: str
    targets: Targets

    @classmethod
    def of(cls, inputs: Inputs, loss: str) -> "Workload":
        return cls(inputs, loss, make_targets(inputs, loss))

    def to(self, dtype: torch.dtype) -> "Workload":
        """Return the same numbers in another dtype."""
        return Workload(self.inputs.to(dtype), self.loss, self.targets)

    @property
    def has_teacher(self) -> bool:
        return has_teacher(self.loss)

    @property
    def one_token(self) -> bool:
        """Whether a row has one target, which is all that most libraries know."""
        return CHOSEN.get(self.loss) == 1

    @property
    def sides(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return student hidden, student weight, teacher hidden, teacher weight."""
        inputs = self.inputs
        return inputs.student_hidden, inputs.student_weight, inputs.teacher_hidden, inputs.teacher_weight


class Gradients(NamedTuple):
    """value [N] in nats, [] of a library that gives the mean alone; the gradients of the mean: hidden [N, H_s], weight [V, H_s]
    or None (frozen head)."""

    value: Tensor
    hidden: Tensor
    weight: Tensor | None


def gradients_of_mean(value: Tensor, inputs: Inputs) -> Gradients:
    """Differentiate the mean over tokens into fresh tensors."""
    hidden, *weight = torch.autograd.grad(value.mean(), inputs.differentiated)
    return Gradients(value.detach(), hidden, weight[0] if weight else None)


def divergence_of_logprobs(student: Tensor, teacher: Tensor, divergence: str) -> Tensor:
    """Return nats [N] of log-probabilities [N, V] by the usual formula, sum p (log p - log q)."""
    if divergence == "forward_kl":
        return (teacher.exp() * (teacher - student)).sum(-1)
    if divergence == "reverse_kl":
        return (student.exp() * (student - teacher)).sum(-1)
    if divergence == "jsd":
        mixture = torch.logaddexp(student + math.log(1 - JSD_BETA), teacher + math.log(JSD_BETA))
        teacher_part = (teacher.exp() * (teacher - mixture)).sum(-1)
        return JSD_BETA * teacher_part + (1 - JSD_BETA) * (student.exp() * (student - mixture)).sum(-1)
    raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, got {divergence!r}")


def cross_entropy_of_logprobs(logprobs: Tensor, targets: Targets) -> Tensor:
    """Return nats [N] of log-probabilities [N, V]."""
    return -(targets.probs * logprobs.gather(-1, targets.ids)).sum(-1)
