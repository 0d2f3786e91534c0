"""Liger 0.8.5. Of its losses those of torch alone run on a CPU: the chunked JSD, compiled as by default, which gives the mean,
and the chunked log-probabilities; on a GPU its fused linear JSD and cross-entropy, which give the mean."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from topd.options import BackendName
from topd_bench.losses import Workload
from topd_bench.peers.peer import UNKNOWN, not_installed, of_loss
from topd_bench.peers.trl import BETA

VOCAB_CHUNK = 4096  # its own default


def refusal(workload: Workload) -> str:
    known = workload.has_teacher or workload.one_token
    return not_installed("liger_kernel", "liger-kernel") if known else UNKNOWN


def loss(workload: Workload, backend: BackendName | None) -> Tensor:
    """Return nats [N] of log-probabilities on a CPU, else their mean []."""
    hidden, weight, *_ = workload.sides
    if workload.inputs.device.type != "cpu":
        return torch.as_tensor(_fused(workload))
    if workload.has_teacher:
        return torch.as_tensor(_chunked(workload))
    return -torch.as_tensor(_logprobs().apply(hidden, weight, workload.targets.ids[:, 0], None, 1.0, VOCAB_CHUNK))


@cache
def _logprobs() -> Any:
    from liger_kernel.chunked_loss.fused_linear_ppo import _ChunkedSelectiveLogProbFunction

    return _ChunkedSelectiveLogProbFunction


def _chunked(workload: Workload) -> Any:
    """Compute the divergence alone: the labels' cross-entropy has weight 0, and is then left out."""
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    function = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETA[workload.loss])
    labels = torch.zeros(workload.inputs.rows, dtype=torch.int64)  # none is the one that is ignored
    return function(*workload.sides, labels)


def _fused(workload: Workload) -> Any:
    if workload.has_teacher:
        from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction

        return LigerFusedLinearJSDFunction.apply(*workload.sides, None, BETA[workload.loss])
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    hidden, weight, *_ = workload.sides
    return LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, workload.targets.ids[:, 0])[0]


PEER = of_loss(loss, refusal)
