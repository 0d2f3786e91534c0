"""TRL 1.16's chunked divergence and chunked log-probabilities, as its trainers call them; on a CPU their fallback in torch."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from topd.options import BackendName
from topd_bench.losses import JSD_BETA, Workload
from topd_bench.peers.peer import UNKNOWN, not_installed, of_loss

BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": JSD_BETA}  # its name of a divergence, with our mixture between the two


def refusal(workload: Workload) -> str:
    known = workload.has_teacher or workload.one_token
    return not_installed("trl", "trl") if known else UNKNOWN


def loss(workload: Workload, backend: BackendName | None) -> Tensor:
    """Return nats [N]."""
    student_hidden, student_weight, teacher_hidden, teacher_weight = workload.sides
    if workload.has_teacher:
        return divergence(student_hidden, student_weight, teacher_hidden, teacher_weight, workload.loss)
    function, chunk = _logprobs()
    logprobs = function.apply(student_hidden, student_weight, None, workload.targets.ids[:, 0], 1.0, chunk, None, 1.0, ())
    return -torch.as_tensor(logprobs[0])


def divergence(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, name: str
) -> Tensor:
    """Return nats [N] at temperature 1; the second output, the student's entropy, is dropped."""
    sides = (student_hidden, student_weight, None, teacher_hidden, teacher_weight, None)
    value, _ = _divergence().apply(*sides, BETA[name], 1.0)
    assert isinstance(value, Tensor)
    return value


@cache
def _divergence() -> Any:
    """Import TRL's autograd function, late: the import takes seconds and pulls in transformers."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    return ChunkedDivergenceFunction


@cache
def _logprobs() -> tuple[Any, int]:
    """Import TRL's function and the chunk size that its trainers use."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer import utils

    return ChunkedLogProbFunction, utils._CHUNKED_LOGPROB_CHUNK_SIZE


PEER = of_loss(loss, refusal)
