"""Contenders for log-probabilities of M chosen tokens: topd, eager torch, TRL's and Liger's chunked log-probabilities.

"logprobs_1" is cross-entropy on random tokens, "logprobs_50" the cross-entropy to random targets over 50 tokens of each row.
Each contender gives the loss of every token and the gradients of its mean. TRL and Liger know one token a row.
"""

import importlib.util
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import topd
from bench.cases import Inputs
from topd.options import BackendName

CHOSEN = {"logprobs_1": 1, "logprobs_50": 50}
LIGER_VOCAB_CHUNK = 4096  # its own default


def targets(inputs: Inputs, loss: str) -> tuple[Tensor, Tensor]:
    """ids [N, M] and their probabilities [N, M]."""
    generator = torch.Generator().manual_seed(1)
    shape = (inputs.student_hidden.shape[0], CHOSEN[loss])
    ids = torch.randint(inputs.student_weight.shape[0], shape, generator=generator)
    return ids, torch.randn(shape, generator=generator).softmax(-1)


def ours(inputs: Inputs, ids: Tensor, probs: Tensor, backend: BackendName | None) -> Tensor:
    """topd.linear_logprobs."""
    head = topd.Head(inputs.student_weight)
    options: dict[str, Any] = {"workspace_bytes": inputs.workspace_bytes, "backend": backend}
    found = topd.linear_logprobs(inputs.student_hidden, head, ids, **options)
    assert isinstance(found, Tensor)
    return -(probs * found).sum(-1)


def eager(inputs: Inputs, ids: Tensor, probs: Tensor) -> Tensor:
    """Full logits and torch's cross-entropy in float32; log_softmax and gather where a row has several tokens."""
    logits = F.linear(inputs.student_hidden, inputs.student_weight).float()
    if ids.shape[1] == 1:
        return F.cross_entropy(logits, ids[:, 0], reduction="none")
    return -(probs * logits.log_softmax(-1).gather(-1, ids)).sum(-1)


@cache
def _trl() -> tuple[Any, int]:
    """TRL's function and the chunk size its trainers use."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer import utils

    return ChunkedLogProbFunction, utils._CHUNKED_LOGPROB_CHUNK_SIZE


def trl(inputs: Inputs, ids: Tensor) -> Tensor:
    """On a CPU its fallback in torch."""
    function, chunk = _trl()
    found = function.apply(inputs.student_hidden, inputs.student_weight, None, ids[:, 0], 1.0, chunk, None, 1.0, ())
    return -torch.as_tensor(found[0])


@cache
def _liger() -> Any:
    from liger_kernel.chunked_loss.fused_linear_ppo import _ChunkedSelectiveLogProbFunction

    return _ChunkedSelectiveLogProbFunction


def liger(inputs: Inputs, ids: Tensor) -> Tensor:
    """Liger's chunked log-probabilities, of its losses that run on a CPU the one that is cross-entropy."""
    found = _liger().apply(inputs.student_hidden, inputs.student_weight, ids[:, 0], None, 1.0, LIGER_VOCAB_CHUNK)
    return -torch.as_tensor(found)


def losses(inputs: Inputs, loss: str, backend: BackendName | None) -> dict[str, Callable[[], Tensor]]:
    """The contenders' per-token losses, by name."""
    ids, probs = targets(inputs, loss)
    found: dict[str, Callable[[], Tensor]] = {
        "ours": partial(ours, inputs, ids, probs, backend),
        "eager": partial(eager, inputs, ids, probs),
    }
    if ids.shape[1] == 1 and importlib.util.find_spec("trl"):
        found["trl"] = partial(trl, inputs, ids)
    if ids.shape[1] == 1 and importlib.util.find_spec("liger_kernel"):
        found["liger"] = partial(liger, inputs, ids)
    return found


def loss_of_logits(inputs: Inputs, loss: str, rows: Tensor, logits: Tensor) -> Tensor:
    """The per-token loss of the chosen rows from their logits, in the logits' dtype."""
    ids, probs = targets(inputs, loss)
    return -(probs[rows] * logits.log_softmax(-1).gather(-1, ids[rows])).sum(-1)
