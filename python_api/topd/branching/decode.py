"""All branches advance together, one token a step, in one forward over the rollouts' cache.

Where attention is torch's own (sdpa), M branches are a batch of M one-token sequences whose keys are `SharedStates`: a step
multiplies each branch with its rollout's columns and its own tokens, nothing else. Where attention is written out (eager), the
branches of a rollout are one sequence of n tokens over its cache, held apart by the mask alone.
"""

from typing import Protocol

import torch
from torch import Tensor

from topd.branching.nodes import Nodes, attention_masks
from topd.branching.noise import Noise
from topd.branching.prefill import Prefill
from topd.branching.shared_states import Places
from topd.models.decoder import Decoder
from topd.models.sampling import Sampling, draw
from topd.models.split_logits import together

# Branches that have ended run along until no more than this share is left: dropping them copies the others' buffers.
REPACK = 0.75


class _Steps(Protocol):
    """All branches, one token after another."""

    def step(self, tokens: Tensor) -> Tensor:
        """Read one token of each branch, [M]; return their states [M, H]."""

    def keep(self, branches: Tensor) -> None:
        """Go on with these of the M branches."""


def _own_nodes(trunk: Nodes, positions: Tensor, steps: int) -> Nodes:
    """Return [M, steps] nodes: each branch's tokens to come, as window 0 of a row of its own."""
    before = positions[:, 1:] - 1
    order = torch.arange(steps, device=positions.device).expand(positions.shape[0], steps)
    position = trunk.position[positions[:, 0]].gather(1, before) + 1 + order
    return Nodes(torch.zeros_like(order), order, before.expand_as(order), position, torch.ones_like(order, dtype=torch.bool))


class _SharedSteps:
    """Steps where attention is torch's own: each branch is a sequence of one token over `SharedStates`."""

    def __init__(self, decoder: Decoder, prefix: Prefill, positions: Tensor, steps: int) -> None:
        from topd.branching.caches import shared_cache

        row = positions[:, 0]
        self.decoder, self.done = decoder, 0
        self.rows, self.columns = prefix.hidden.shape[0], int(positions[:, 1].max())
        self.places = Places.of(row, self.rows)
        self.cache = shared_cache(prefix, self.columns, self.places, steps)
        trunk = prefix.trunk.columns(0, self.columns)
        self.nodes = trunk.pick(row).join(_own_nodes(prefix.trunk, positions, steps))
        self.dtype = prefix.hidden.dtype

    def step(self, tokens: Tensor) -> Tensor:
        column = self.columns + self.done
        queries, keys = self.nodes.columns(column, column + 1), self.nodes.columns(0, column + 1)
        mask = attention_masks(queries, keys, self.decoder.sliding, self.dtype)
        self.done += 1
        return self.decoder.states(tokens.unsqueeze(-1), mask, queries.position, self.cache)[:, 0]

    def keep(self, branches: Tensor) -> None:
        self.nodes = self.nodes.pick(branches)
        self.places = Places.of(self.places.row[branches], self.rows)
        for layer in self.cache.layers:
            layer.keep(branches, self.places)


class _TreeSteps:
    """Steps where attention is written out: the branches of a rollout are one sequence, held apart by the mask."""

    def __init__(self, decoder: Decoder, prefix: Prefill, positions: Tensor, steps: int) -> None:
        from topd.branching.caches import tree_cache

        places = Places.of(positions[:, 0], prefix.hidden.shape[0])
        m = positions.shape[0]
        self.slot = torch.arange(m, device=positions.device) if places.slot is None else places.slot
        self.decoder, self.done = decoder, 0
        self.shape, self.columns = (places.rows, places.most), int(positions[:, 1].max())
        self.cache = tree_cache(prefix, self.columns, places.most * steps)
        self.nodes = prefix.trunk.columns(0, self.columns).join(self._own(prefix.trunk, positions, steps))
        self.dtype = prefix.hidden.dtype

    def _own(self, trunk: Nodes, positions: Tensor, steps: int) -> Nodes:
        """Return [B, steps n] nodes: first every branch's first token, then every branch's second. Empty places see
        themselves."""
        rows, most = self.shape
        own = _own_nodes(trunk, positions, steps)
        blank = positions.new_zeros(rows * most, steps)

        def table(value: Tensor) -> Tensor:
            spread = blank.to(value.dtype).index_copy(0, self.slot, value)
            return spread.view(rows, most, steps).transpose(1, 2).reshape(rows, steps * most)

        window = torch.arange(most, device=positions.device).expand(rows, most).repeat(1, steps)
        return Nodes(window, table(own.order), table(own.limit), table(own.position), torch.ones_like(window, dtype=torch.bool))

    def step(self, tokens: Tensor) -> Tensor:
        rows, most = self.shape
        start = self.columns + self.done * most
        queries, keys = self.nodes.columns(start, start + most), self.nodes.columns(0, start + most)
        mask = attention_masks(queries, keys, self.decoder.sliding, self.dtype)
        self.done += 1
        table = tokens.new_zeros(rows * most).index_copy_(0, self.slot, tokens).view(rows, most)
        states = self.decoder.states(table, mask, queries.position, self.cache)
        return states.reshape(rows * most, -1)[self.slot]

    def keep(self, branches: Tensor) -> None:
        self.slot = self.slot[branches]


class _Draws:
    """The tokens of all windows so far, and which windows go on.

    Attributes:
        tokens: [m, horizon] int64, 0 past a window's end.
        lengths: [m] int64.
        running: [M] the windows whose branches are still there.
        alive: [M] bool, which of them have not ended.
    """

    def __init__(self, positions: Tensor, sampling: Sampling) -> None:
        m, device = positions.shape[0], positions.device
        self.tokens, self.lengths = positions.new_zeros(m, sampling.horizon), positions.new_zeros(m)
        self.running = positions[:, 0].argsort(stable=True)
        self.alive = torch.ones(m, dtype=torch.bool, device=device)
        self.stops = torch.tensor(sampling.ends, dtype=torch.int64, device=device)

    def add(self, place: int, drawn: Tensor) -> None:
        """Write one token [M] of each running window."""
        self.tokens[self.running, place] = torch.where(self.alive, drawn, 0)
        self.lengths[self.running] += self.alive
        if self.stops.numel():
            self.alive = self.alive & ~torch.isin(drawn, self.stops)

    def kept(self) -> Tensor | None:
        """Return the branches that have not ended, where few enough are left to be worth a copy; None: go on with all."""
        if not self.stops.numel():
            return None
        left = int(self.alive.sum())
        return self.alive.nonzero()[:, 0] if left <= REPACK * self.alive.numel() else None

    def keep(self, branches: Tensor) -> None:
        """Go on with these of the M branches."""
        self.running, self.alive = self.running[branches], self.alive[branches]


@torch.no_grad()
def decode(
    decoder: Decoder, prefix: Prefill, positions: Tensor, sampling: Sampling, noise: Noise | None = None
) -> tuple[Tensor, Tensor]:
    """Continue the prefix before each position, by branching.

    Args:
        prefix: the pass over the rollouts, with its cache.
        positions: [m, 2] int64 (row, column), column >= 1, any order.
        noise: of these windows; None: the generator's. Where it follows the rollouts, the pass is over all their columns.

    Returns:
        tokens [m, horizon] int64, 0 past a window's end, and lengths [m] int64, an end-of-sequence token counted.
    """
    prefix = prefix.constant()
    draws = _Draws(positions, sampling)
    kind = _SharedSteps if decoder.model.config._attn_implementation == "sdpa" else _TreeSteps
    steps: _Steps | None = None
    row, column = positions[draws.running].unbind(-1)
    hidden = prefix.hidden[row, column - 1]
    for place in range(sampling.horizon):
        logits = decoder.logits(hidden, sampling.vocab)
        if noise is None:
            drawn = draw(logits, sampling.temperature, sampling.generator)
        else:
            drawn = noise.choose(logits / sampling.temperature, draws.running, place)
        drawn = together(decoder.output, drawn)
        draws.add(place, drawn)
        kept = draws.kept()
        if kept is not None:
            if not kept.numel():
                break
            draws.keep(kept)
            drawn = drawn[kept]
            if steps is not None:
                steps.keep(kept)
        if place + 1 < sampling.horizon:
            steps = steps or kind(decoder, prefix, positions[draws.running], sampling.horizon - 1)
            hidden = steps.step(drawn)
            if noise is not None and noise.followed is not None:
                said = draws.tokens[draws.running, : place + 1]
                hidden = noise.followed.over_rollout(hidden, prefix.hidden, draws.running, said)
    return draws.tokens, draws.lengths
