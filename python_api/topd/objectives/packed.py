"""Rollouts packed one after the other: [N] tokens and cu_seqlens, as flash-attn's varlen functions take them.

One forward of each model over [1, N] whose position_ids start anew at each sequence, one `linear_divergence`; no padding is
computed. Row t - 1 is paired with token t: sound, since a response token is never the first of its sequence.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from topd.checks.rollouts import binary, check_differentiable, check_ids
from topd.checks.tokens import check_offsets
from topd.checks.values import check_tensor
from topd.models.decoder import Decoder, decoder_of
from topd.objectives.batch import Stages, at_token, compare_states, scores_at_token
from topd.objectives.config import OPDConfig
from topd.scores import TokenScores

PACKED_KEYS = ("input_ids", "cu_seqlens", "response_mask")


@dataclass(frozen=True, eq=False)
class Packed:
    """Rollouts [N]; every tensor but `bounds` is of that shape.

    Attributes:
        input_ids: int64.
        response: bool.
        bounds: [B + 1] int64, where the sequences begin and end.
        sequence: int64, the sequence of each token.
    """

    input_ids: Tensor
    response: Tensor
    bounds: Tensor
    sequence: Tensor

    @property
    def position_ids(self) -> Tensor:
        return torch.arange(self.sequence.numel(), device=self.sequence.device) - self.bounds[self.sequence]

    def counts(self) -> Tensor:
        """[B] int64, response tokens of each sequence."""
        counts = torch.zeros_like(self.bounds[1:])
        return counts.index_add_(0, self.sequence, self.response.long())

    def siblings(self) -> Tensor:
        """[N] int64, response tokens of the token's sequence, at least 1."""
        return self.counts().clamp_min(1)[self.sequence]


def is_packed(batch: object) -> bool:
    return isinstance(batch, Mapping) and "cu_seqlens" in batch


def check_packed(batch: Mapping[str, Any]) -> Packed:
    """input_ids, cu_seqlens and response_mask of a packed batch."""
    for key in PACKED_KEYS:
        if key not in batch:
            raise ValueError(f"a packed batch must hold {', '.join(PACKED_KEYS)}, got no {key}; it has {sorted(batch)}")
    if "attention_mask" in batch:
        raise ValueError("a packed batch must hold no attention_mask, since it has no padding, got one; leave it out")
    ids = check_tensor("input_ids", batch["input_ids"], dtype=torch.int64)
    if ids.dim() != 1:
        raise ValueError(f"input_ids must be [N] with cu_seqlens, got {list(ids.shape)}; leave padding and batch dimension out")
    bounds = check_offsets(batch["cu_seqlens"], ids, "input_ids")
    response = binary("response_mask", batch["response_mask"], ids, "input_ids")
    starts = bounds[:-1][bounds.diff() > 0]
    if ids.device.type == "cpu" and response[starts].any():
        first = int(starts[response[starts]][0])
        raise ValueError(
            f"response_mask must be False at the first token of a sequence, got True at {first}; a response follows a prompt"
        )
    at = torch.arange(ids.numel(), device=ids.device)
    sequence = torch.bucketize(at, bounds[1:], right=True).clamp_max(max(bounds.numel() - 2, 0))
    return Packed(ids, response, bounds, sequence)


def packed_pass(
    student_model: Any, teacher_model: Any, packed: Packed, config: OPDConfig, stages: Stages
) -> tuple[Tensor, TokenScores]:
    """The loss of each response token [N], 0 elsewhere, and its scores."""
    student, teacher = packing_decoder("student", student_model), packing_decoder("teacher", teacher_model)
    check_differentiable("student", student.model)
    check_ids("input_ids", packed.input_ids, student=student_model, teacher=teacher_model)
    given = packed.input_ids, packed.position_ids, packed.bounds
    with stages.stage("student_forward"):
        student_hidden = student.packed_states(*given)
    with stages.stage("teacher_forward"), torch.no_grad():
        teacher_hidden = teacher.packed_states(*given)
    hint = 1.0 / packed.siblings()[1:] if config.reduction == "sequence" else None
    with stages.stage("divergence"):
        loss, scores = compare_states(
            (student_hidden[:-1], student.head),
            (teacher_hidden[:-1], teacher.head),
            packed.response[1:],
            packed.input_ids[1:],
            hint,
            config,
        )
    tokens = packed.input_ids.numel()
    return at_token(loss, tokens), scores_at_token(scores, tokens)


def packing_decoder(name: str, model: Any) -> Decoder:
    """The model opened up, refused where it cannot keep packed sequences apart."""
    decoder = decoder_of(model)
    if decoder.unpackable:
        raise ValueError(
            f"{name} must keep packed sequences apart, got {type(decoder.model).__name__}: {decoder.unpackable}; pad the batch "
            "and give attention_mask instead of cu_seqlens"
        )
    return decoder


def reduce_packed(loss: Tensor, packed: Packed, reduction: str, num_items: float | Tensor | None) -> Tensor:
    """As `reduce_tokens`."""
    if reduction == "token":
        total, own = loss.sum(), packed.response.sum()
    else:
        total, own = (loss / packed.siblings()).sum(), (packed.counts() > 0).sum()
    denominator = own.clamp_min(1).to(loss.dtype) if num_items is None else num_items
    return total / (denominator.to(loss.device) if isinstance(denominator, Tensor) else denominator)
