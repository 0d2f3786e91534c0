"""All that a step reads: the rollouts, the teacher's side of them, and what is said of tokens and responses beside."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from topd.checks.values import FLOATING, check_constant, check_tensor
from topd.objectives.batch import PADDED_KEYS, Batch, Padded, check_batch, check_keys, check_padded
from topd.objectives.packed import PACKED_KEYS, is_packed
from topd.objectives.pairs import PACKED_PAIR_KEYS, PADDED_PAIR_KEYS, Pairs, check_pairs

EXTRA_KEYS = ("token_weights", "verdict")


@dataclass(frozen=True, eq=False)
class Inputs:
    """A checked batch.

    Attributes:
        rollouts: what the student reads.
        pairs: which of its response tokens is which of the teacher's; None: the teacher reads the rollouts.
        token_weights: [B, T] or [N], float32 or wider, of each token's loss, 0 outside the responses; None: all weigh 1.
        verdict: [B] bool, whether each response is correct; None: not known.
    """

    rollouts: Batch
    pairs: Pairs | None = None
    token_weights: Tensor | None = None
    verdict: Tensor | None = None

    @property
    def teacher_batch(self) -> Batch:
        """What the teacher reads."""
        return self.rollouts if self.pairs is None else self.pairs.teacher


@dataclass(frozen=True, eq=False)
class PaddedInputs(Inputs):
    """A checked batch that is padded and the same for student and teacher."""

    rollouts: Padded


def check_inputs(batch: Mapping[str, Any]) -> Inputs:
    """Check a batch, padded or packed, with or without a teacher's side; refuse a key that nobody reads."""
    rollouts = check_batch(batch)
    own, others = (PACKED_KEYS, PACKED_PAIR_KEYS) if is_packed(batch) else (PADDED_KEYS, PADDED_PAIR_KEYS)
    pairs = check_pairs(batch, rollouts)
    check_keys(batch, (*own, *EXTRA_KEYS, *others))
    return Inputs(rollouts, pairs, *check_extras(batch, rollouts))


def check_padded_inputs(batch: Mapping[str, Any]) -> PaddedInputs:
    """Check a batch that is padded and the same for student and teacher; refuse a key that nobody reads."""
    rollouts = check_padded(batch)
    check_keys(batch, PADDED_KEYS + EXTRA_KEYS)
    return PaddedInputs(rollouts, None, *check_extras(batch, rollouts))


def check_extras(batch: Mapping[str, Any], rollouts: Batch) -> tuple[Tensor | None, Tensor | None]:
    """Check token_weights and verdict of a batch, and return them; None where they are left out."""
    weights, verdict = None, None
    if "token_weights" in batch:
        weights = _weights(batch["token_weights"], rollouts)
    if "verdict" in batch:
        shape, device = ((rollouts.rows,), "an entry for each rollout"), (rollouts.input_ids.device, "input_ids")
        verdict = check_tensor("verdict", batch["verdict"], dtype=torch.bool, shape=shape, device=device)
    return weights, verdict


def _weights(value: object, rollouts: Batch) -> Tensor:
    """Return token_weights in float32 or wider, 0 outside the responses, where they are not read; values are checked on the
    CPU."""
    like = rollouts.input_ids
    shape, device = (like.shape, "the shape of input_ids"), (like.device, "input_ids")
    weights = check_tensor("token_weights", value, dtype=FLOATING, shape=shape, device=device)
    check_constant("token_weights", weights, "a weight")
    weights = weights.to(torch.promote_types(weights.dtype, torch.float32)).masked_fill(~rollouts.response, 0.0)
    if weights.device.type == "cpu" and (bad := ~((weights >= 0) & weights.isfinite())).any():
        place = bad.nonzero()[0].tolist()
        raise ValueError(
            f"token_weights must be finite and >= 0 at response tokens, got {weights[tuple(place)].item():g} at {place}; 0 "
            "leaves a token out"
        )
    return weights
