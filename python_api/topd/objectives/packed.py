"""Rollouts packed one after the other: [N] tokens and cu_seqlens, as flash-attn's varlen functions take them.

A model reads them as [1, N] whose position_ids start anew at each sequence; no padding is computed. Row t - 1 is paired with
token t: sound, since a response token is never the first of its sequence.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from topd.checks.rollouts import binary
from topd.checks.tokens import check_offsets
from topd.checks.values import check_tensor
from topd.models.context_parallel import refuse_context_parallel
from topd.models.decoder import Decoder, decoder_of

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
    def rows(self) -> int:
        """How many sequences there are, B."""
        return self.bounds.numel() - 1

    def row_of(self, tokens: Tensor) -> Tensor:
        """Return the sequence of each token, given by its place in input_ids."""
        return self.sequence[tokens]

    @property
    def position_ids(self) -> Tensor:
        """[N] int64, each token's place in its sequence."""
        return torch.arange(self.sequence.numel(), device=self.sequence.device) - self.bounds[self.sequence]

    def decoder(self, name: str, model: Any) -> Decoder:
        """Return the decoder of a model; refuse one that cannot keep packed sequences apart."""
        decoder = decoder_of(model)
        if decoder.unpackable:
            raise ValueError(
                f"{name} must keep packed sequences apart, got {type(decoder.model).__name__}: {decoder.unpackable}; pad the "
                "batch and give attention_mask instead of cu_seqlens"
            )
        return decoder

    def hidden(self, decoder: Decoder) -> Tensor:
        """Return the model's states [N, H]."""
        return decoder.packed_states(self.input_ids, self.position_ids, self.bounds)

    def counts(self) -> Tensor:
        """Return [B] int64: the response tokens of each sequence."""
        counts = torch.zeros_like(self.bounds[1:])
        return counts.index_add_(0, self.sequence, self.response.long())

    def siblings(self) -> Tensor:
        """Return [N] int64: the response tokens of the token's sequence, at least 1."""
        return self.counts().clamp_min(1)[self.sequence]


def is_packed(batch: object) -> bool:
    """Return whether a batch is a packed one."""
    return isinstance(batch, Mapping) and "cu_seqlens" in batch


def check_packed(batch: Mapping[str, Any], side: str = "") -> Packed:
    """Check input_ids, cu_seqlens and response_mask of a packed batch; their names begin with `side`."""
    refuse_context_parallel(
        "a packed batch",
        "hold whole sequences, which are kept apart by the places of their tokens",
        "pad the batch and give attention_mask, or leave the block",
    )
    keys = [side + key for key in PACKED_KEYS]
    for key in keys:
        if key not in batch:
            raise ValueError(f"a packed batch must hold {', '.join(keys)}, got no {key}; it has {sorted(batch)}")
    if f"{side}attention_mask" in batch:
        raise ValueError(f"a packed batch must hold no {side}attention_mask, since it has no padding, got one; leave it out")
    name, offsets, mask = keys
    ids = check_tensor(name, batch[name], dtype=torch.int64)
    if ids.dim() != 1:
        raise ValueError(f"{name} must be [N] with {offsets}, got {list(ids.shape)}; leave padding and batch dimension out")
    bounds = check_offsets(batch[offsets], ids, name, side)
    response = binary(mask, batch[mask], ids, name)
    starts = bounds[:-1][bounds.diff() > 0]
    if ids.device.type == "cpu" and response[starts].any():
        first = int(starts[response[starts]][0])
        raise ValueError(
            f"{mask} must be False at the first token of a sequence, got True at {first}; a response follows a prompt"
        )
    entries = torch.arange(ids.numel(), device=ids.device)
    sequence = torch.bucketize(entries, bounds[1:], right=True).clamp_max(max(bounds.numel() - 2, 0))
    return Packed(ids, response, bounds, sequence)
