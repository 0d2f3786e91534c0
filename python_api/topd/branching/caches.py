"""Layers for transformers' `Cache`; each grows from a prefix [B, heads, T, d] that stays as it is."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from topd.branching.prefill import Prefill
from topd.branching.shared_states import Places, SharedStates


class PrefixLayer(DynamicLayer):  # type: ignore[misc]
    """Prefix and what is new, with gradients through both; keeps nothing, so that one prefix serves many calls."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)


class TreeLayer(PrefixLayer):
    """Prefix and the branches' tokens side by side in a buffer that is allocated once; each update is a new step."""

    def __init__(self, keys: Tensor, values: Tensor, room: int) -> None:
        super().__init__(keys, values)
        self.filled = keys.shape[2]
        self.buffers = [
            torch.cat([states, states.new_empty(*states.shape[:2], room, states.shape[3])], dim=2) for states in (keys, values)
        ]

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        end = self.filled + keys.shape[2]
        for buffer, new in zip(self.buffers, (keys, values), strict=True):
            buffer[:, :, self.filled : end] = new
        self.filled = end
        return self.buffers[0][:, :, :end], self.buffers[1][:, :, :end]

    def get_seq_length(self) -> int:
        return self.filled


class SharedLayer(DynamicLayer):  # type: ignore[misc]
    """The prefix by reference and each branch's own tokens in a buffer that is allocated once."""

    def __init__(self, keys: Tensor, values: Tensor, places: Places, steps: int) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        self.places, self.steps = places, 0
        m = places.row.numel()
        self.own = [states.new_empty(m, states.shape[1], steps, states.shape[3]) for states in (keys, values)]

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[SharedStates, SharedStates]:
        for buffer, new in zip(self.own, (keys, values), strict=True):
            buffer[:, :, self.steps : self.steps + 1] = new
        self.steps += 1
        own = [buffer[:, :, : self.steps] for buffer in self.own]
        return SharedStates(self.keys, own[0], self.places), SharedStates(self.values, own[1], self.places)

    def keep(self, branches: Tensor, places: Places) -> None:
        """Go on with these branches alone."""
        self.places, self.own = places, [buffer[branches] for buffer in self.own]

    def get_seq_length(self) -> int:
        return int(self.keys.shape[2]) + self.steps


def prefix_cache(layers: list[tuple[Tensor, Tensor]]) -> Any:
    """Return a cache of a prefix's keys and values, through which gradients go."""
    return Cache(layers=[PrefixLayer(*layer) for layer in layers])


def tree_cache(prefix: Prefill, columns: int, room: int) -> Any:
    """Return a cache of the prefix's first `columns`, with room for as many further tokens in each row."""
    layers = prefix.layers or []
    return Cache(layers=[TreeLayer(keys[:, :, :columns], values[:, :, :columns], room) for keys, values in layers])


def shared_cache(prefix: Prefill, columns: int, places: Places, steps: int) -> Any:
    """Return a cache of the prefix's first `columns`, shared by the branches at `places`, each with room for its own steps."""
    layers = prefix.layers or []
    return Cache(layers=[SharedLayer(keys[:, :, :columns], values[:, :, :columns], places, steps) for keys, values in layers])
