"""Liger 0.8.5: on a CPU its chunked log-probabilities, of its losses that run there the one that is cross-entropy; on a GPU its
fused linear JSD and cross-entropy, which give the mean."""

import importlib.util
from functools import cache
from typing import Any

import torch
from torch import Tensor

from topd_bench.losses import Workload
from topd_bench.peers.trl import BETA

VOCAB_CHUNK = 4096  # its own default


def offers(workload: Workload) -> bool:
    fused = workload.inputs.device.type != "cpu" and workload.has_teacher
    return installed() and (fused or workload.one_token)


def installed() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


def loss(workload: Workload) -> Tensor:
    """Return nats [N] on a CPU, their mean [] on a GPU."""
    hidden, weight, *_ = workload.sides
    if workload.inputs.device.type != "cpu":
        return torch.as_tensor(_fused(workload))
    return -torch.as_tensor(_logprobs().apply(hidden, weight, workload.targets.ids[:, 0], None, 1.0, VOCAB_CHUNK))


@cache
def _logprobs() -> Any:
    from liger_kernel.chunked_loss.fused_linear_ppo import _ChunkedSelectiveLogProbFunction

    return _ChunkedSelectiveLogProbFunction


def _fused(workload: Workload) -> Any:
    if workload.has_teacher:
        from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction

        return LigerFusedLinearJSDFunction.apply(*workload.sides, None, BETA[workload.loss])
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    hidden, weight, *_ = workload.sides
    return LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, workload.targets.ids[:, 0])[0]
