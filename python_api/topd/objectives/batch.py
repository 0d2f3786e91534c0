"""What every objective starts from: a checked batch, padded or packed, and both models opened."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from topd.branching.prefill import prefill
from topd.checks.rollouts import binary, check_differentiable, check_ids, check_rollouts
from topd.models.decoder import Decoder, decoder_of
from topd.models.properties import embedded_tokens
from topd.objectives.packed import Packed, check_packed, is_packed

PADDED_KEYS = ("input_ids", "attention_mask", "response_mask")


@dataclass(frozen=True, eq=False)
class Padded:
    """Rollouts [B, T]: tokens int64; attended and response bool. Column t is about token t, whose state is at t - 1."""

    input_ids: Tensor
    attended: Tensor
    response: Tensor

    @property
    def rows(self) -> int:
        """How many rollouts there are, B."""
        return self.input_ids.shape[0]

    def row_of(self, tokens: Tensor) -> Tensor:
        """Return the rollout of each token, given by its place in input_ids, row by row."""
        return tokens // max(self.input_ids.shape[1], 1)

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


def check_batch(batch: Mapping[str, Any]) -> Batch:
    """Check a padded batch, or a packed one, which has cu_seqlens."""
    return check_packed(batch) if is_packed(batch) else check_padded(batch)


def check_padded(batch: object, side: str = "") -> Padded:
    """Check input_ids, attention_mask and response_mask of a padded batch; their names begin with `side`."""
    if not isinstance(batch, Mapping):
        raise TypeError(f"batch must be a mapping of tensors, got {type(batch).__name__}")
    if "cu_seqlens" in batch:
        raise ValueError(
            "batch must be padded, input_ids [B, T], where windows branch off the rollouts, got a packed one with cu_seqlens; "
            "pad it and give attention_mask, or take topd.OPD"
        )
    for key in PADDED_KEYS:
        if side + key not in batch:
            raise ValueError(
                f"batch must hold {side}input_ids, {side}attention_mask and {side}response_mask, got no {side}{key}; it has "
                f"{sorted(batch)}"
            )
    ids, attended = check_rollouts(batch[f"{side}input_ids"], batch[f"{side}attention_mask"], side)
    response = binary(f"{side}response_mask", batch[f"{side}response_mask"], ids, f"{side}input_ids")
    before = torch.zeros_like(attended)
    before[:, 1:] = attended[:, :-1]
    bad = response & ~(attended & before)
    if bad.device.type == "cpu" and bad.any():
        raise ValueError(
            f"{side}response_mask must be True only where the token and the one before it are attended, got True at "
            f"{bad.nonzero()[0].tolist()}; a response follows a prompt, and padding is no response"
        )
    return Padded(ids, attended, response)


def check_keys(batch: object, keys: tuple[str, ...]) -> None:
    """Check that a batch holds nothing that the objective would not read."""
    for key in batch if isinstance(batch, Mapping) else ():
        if key not in keys:
            hint = "; positions follow from attention_mask or cu_seqlens" if key == "position_ids" else ""
            raise ValueError(f"batch may hold {', '.join(keys)}, got {key!r}, which is not read; leave it out{hint}")


def open_student(model: Any, batch: Batch) -> Decoder:
    """Return the student's decoder; check that it can read the batch and be trained."""
    student = batch.decoder("student", model)
    check_differentiable("student", student.model)
    return student


def check_tokens(batch: Batch, side: str = "", **models: Any) -> None:
    """Check that each model, given by its name, has every token of a batch; the name of input_ids begins with `side`."""
    check_ids(f"{side}input_ids", batch.input_ids, **{name: embedded_tokens(model) for name, model in models.items()})
