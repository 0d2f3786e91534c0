"""What every objective starts from: a checked batch, padded or packed, both models opened, and what each token costs."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from topd.branching.prefill import prefill
from topd.checks.rollouts import binary, check_differentiable, check_ids, check_rollouts
from topd.head import Head
from topd.losses.linear_divergence import linear_divergence
from topd.models.decoder import Decoder, decoder_of
from topd.models.properties import embedded_tokens
from topd.objectives.config import OPDConfig
from topd.objectives.packed import PACKED_KEYS, Packed, check_packed, is_packed
from topd.objectives.reduction import reduction_hint
from topd.scores import TokenScores

PADDED_KEYS = ("input_ids", "attention_mask", "response_mask")


@dataclass(frozen=True, eq=False)
class Padded:
    """Rollouts [B, T]: tokens int64; attended and response bool. Column t is about token t, whose state is at t - 1."""

    input_ids: Tensor
    attended: Tensor
    response: Tensor

    def decoder(self, _name: str, model: Any) -> Decoder:
        """Return the decoder of a model; every one can read padded rollouts."""
        return decoder_of(model)

    def hidden(self, decoder: Decoder) -> Tensor:
        """Return the model's states [B, T, H]."""
        return prefill(decoder, self.input_ids, self.attended, cache=False).hidden

    def counts(self) -> Tensor:
        """Return [B] int64: the response tokens of each rollout."""
        return self.response.sum(-1)

    def siblings(self) -> Tensor:
        """Return [B, 1] int64: the response tokens of the token's rollout, at least 1."""
        return self.counts().clamp_min(1).unsqueeze(-1)


Batch = Padded | Packed


class TokenLosses(NamedTuple):
    """The loss of each response token, [B, T] or [N], 0 elsewhere, and its scores."""

    loss: Tensor
    scores: TokenScores


def check_batch(batch: Mapping[str, Any]) -> Batch:
    """Check a padded batch, or a packed one, which has cu_seqlens; refuse a key that nobody reads."""
    if is_packed(batch):
        packed = check_packed(batch)
        check_keys(batch, PACKED_KEYS)
        return packed
    padded = check_padded(batch)
    check_keys(batch, PADDED_KEYS)
    return padded


def check_padded(batch: object) -> Padded:
    """Check input_ids, attention_mask and response_mask of a padded batch."""
    if not isinstance(batch, Mapping):
        raise TypeError(f"batch must be a mapping of tensors, got {type(batch).__name__}")
    if "cu_seqlens" in batch:
        raise ValueError(
            "batch must be padded, input_ids [B, T], where windows branch off the rollouts, got a packed one with cu_seqlens; "
            "pad it and give attention_mask, or take topd.OPD"
        )
    for key in PADDED_KEYS:
        if key not in batch:
            raise ValueError(
                f"batch must hold input_ids, attention_mask and response_mask, got no {key}; it has {sorted(batch)}"
            )
    ids, attended = check_rollouts(batch["input_ids"], batch["attention_mask"])
    response = binary("response_mask", batch["response_mask"], ids, "input_ids")
    before = torch.zeros_like(attended)
    before[:, 1:] = attended[:, :-1]
    bad = response & ~(attended & before)
    if bad.device.type == "cpu" and bad.any():
        raise ValueError(
            "response_mask must be True only where the token and the one before it are attended, got True at "
            f"{bad.nonzero()[0].tolist()}; a response follows a prompt, and padding is no response"
        )
    return Padded(ids, attended, response)


def check_keys(batch: object, keys: tuple[str, ...]) -> None:
    """Check that a batch holds nothing that the objective would not read."""
    for key in batch if isinstance(batch, Mapping) else ():
        if key not in keys:
            hint = "; positions follow from attention_mask or cu_seqlens" if key == "position_ids" else ""
            raise ValueError(f"batch may hold {', '.join(keys)}, got {key!r}, which is not read; leave it out{hint}")


def open_models(student_model: Any, teacher_model: Any, batch: Batch) -> tuple[Decoder, Decoder]:
    """Return both models' decoders; check that the student can be trained, and that both have every token."""
    student, teacher = batch.decoder("student", student_model), batch.decoder("teacher", teacher_model)
    check_differentiable("student", student.model)
    sizes = {"student": embedded_tokens(student_model), "teacher": embedded_tokens(teacher_model)}
    check_ids("input_ids", batch.input_ids, **sizes)
    return student, teacher


def token_losses(student: tuple[Tensor, Head], teacher: tuple[Tensor, Head], batch: Batch, config: OPDConfig) -> TokenLosses:
    """Compare both models' states over a batch, each paired with the token that it predicts: the one `linear_divergence`.

    Args:
        student, teacher: hidden [B, T, H] or [N, H], and the head.
    """
    result = linear_divergence(
        student[0][..., :-1, :],
        student[1],
        teacher[0][..., :-1, :],
        teacher[1].detach(),
        divergence=config.divergence,
        temperature=config.temperature,
        mask=batch.response[..., 1:],
        tokens=batch.input_ids[..., 1:],
        hard_weight=config.hard_weight,
        weights_hint=reduction_hint(batch, config.reduction),
        return_scores=True,
    )
    assert isinstance(result, tuple)
    loss, scores = result
    columns = batch.input_ids.shape[-1]
    return TokenLosses(by_token(loss, columns), scores_by_token(scores, columns))


def by_token(value: Tensor, columns: int) -> Tensor:
    """Turn [..., T - 1], indexed by the state, into [..., T], indexed by the token; T may be 0."""
    return torch.cat([value.new_zeros(*value.shape[:-1], 1), value], dim=-1)[..., :columns]


def scores_by_token(scores: TokenScores, columns: int) -> TokenScores:
    """Turn scores indexed by the state into scores indexed by the token."""
    given = {field.name: getattr(scores, field.name) for field in fields(scores)}
    shifted: dict[str, Any] = {name: None if value is None else by_token(value, columns) for name, value in given.items()}
    return TokenScores(**shifted)
