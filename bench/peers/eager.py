"""Eager code as it is usually written: full logits in the models' dtype, widened to float32, log_softmax, the usual formula."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.losses import Targets, Workload, cross_entropy_of_logprobs, divergence_of_logprobs, has_teacher


def loss(workload: Workload) -> Tensor:
    """Return nats [N]; for one token a row by torch's own cross-entropy."""
    return _full_logits(workload.loss, *workload.sides, *workload.targets)


def compiled(workload: Workload) -> Callable[[], Tensor]:
    """Return the same under torch.compile, not compiled yet."""
    torch.compiler.reset()  # after eight variants torch would run eager code in silence
    function: Callable[..., Tensor] = torch.compile(_full_logits, dynamic=False)
    return partial(function, workload.loss, *workload.sides, *workload.targets)


def _full_logits(
    loss: str, hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, ids: Tensor, probs: Tensor
) -> Tensor:
    if not has_teacher(loss):
        logits = F.linear(hidden, weight).float()
        if ids.shape[1] == 1:
            return F.cross_entropy(logits, ids[:, 0], reduction="none")
        return cross_entropy_of_logprobs(logits.log_softmax(-1), Targets(ids, probs))
    student = F.log_softmax(F.linear(hidden, weight).float(), dim=-1)
    with torch.no_grad():
        teacher = F.log_softmax(F.linear(teacher_hidden, teacher_weight).float(), dim=-1)
    return divergence_of_logprobs(student, teacher, loss)
