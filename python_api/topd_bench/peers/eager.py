"""Eager code as it is usually written: full logits in the models' dtype, widened to float32, log_softmax, the usual formula."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from topd.options import BackendName
from topd_bench.losses import (
    Gradients,
    Targets,
    Workload,
    cross_entropy_of_logprobs,
    divergence_of_logprobs,
    gradients_of_mean,
    has_teacher,
)
from topd_bench.peers.peer import Differentiable, Peer


def gradients(workload: Workload) -> Gradients:
    """Take a step: the log-probabilities of both sides are local variables, alive until the gradients are there, as in the loop
    of a trainer."""
    student_hidden, student_weight, teacher_hidden, teacher_weight = workload.sides
    if not workload.has_teacher:
        return gradients_of_mean(_cross_entropy(student_hidden, student_weight, *workload.targets), workload.inputs)
    student = logprobs(student_hidden, student_weight)
    with torch.no_grad():
        teacher = logprobs(teacher_hidden, teacher_weight)
    return gradients_of_mean(divergence_of_logprobs(student, teacher, workload.loss), workload.inputs)


def loss_of(
    loss: str, hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, ids: Tensor, probs: Tensor
) -> Tensor:
    """Return nats [N]."""
    if not has_teacher(loss):
        return _cross_entropy(hidden, weight, ids, probs)
    with torch.no_grad():
        teacher = logprobs(teacher_hidden, teacher_weight)
    return divergence_of_logprobs(logprobs(hidden, weight), teacher, loss)


def logprobs(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return log-probabilities [N, V] float32 from full logits."""
    return F.log_softmax(F.linear(hidden, weight).float(), dim=-1)


def _cross_entropy(hidden: Tensor, weight: Tensor, ids: Tensor, probs: Tensor) -> Tensor:
    """Return nats [N]; for one token a row by torch's own cross-entropy."""
    if ids.shape[1] == 1:
        return F.cross_entropy(F.linear(hidden, weight).float(), ids[:, 0], reduction="none")
    return cross_entropy_of_logprobs(logprobs(hidden, weight), Targets(ids, probs))


def contender(workload: Workload, backend: BackendName | None) -> Differentiable:
    """Return what takes a step."""
    return partial(gradients, workload)


PEER = Peer(contender)
