"""All branches advance together, one token a step, in one forward over the rollouts' cache.

Where attention is torch's own (sdpa), M branches are a batch of M one-token sequences whose keys are `SharedStates`: a step
multiplies each branch with its rollout's columns and its own tokens, nothing else. Where attention is written out (eager), the
branches of a rollout are one sequence of n tokens over its cache, held apart by the mask alone.
"""

from typing import Protocol

import torch
from torch import Tensor

from topd.branching.nodes import Nodes, attention_masks
from topd.branching.prefill import Prefill
from topd.branching.shared_states import Places
from topd.models.decoder import Decoder

# Branches that have ended run along until no more than this share is left: dropping them copies the others' buffers.
REPACK = 0.75
BLOCK = 1024


def draw(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """One token for each row of logits [M, V]; temperature 0 takes the most likely one."""
    return most_likely(perturbed(logits, temperature, generator))


def most_likely(scores: Tensor) -> Tensor:
    """argmax of [M, V], the first of equals. By blocks on a CPU: there torch's argmax takes ten times as long as its amax."""
    vocab = scores.shape[-1]
    blocks = vocab // BLOCK
    if blocks < 2 or scores.device.type != "cpu":
        return scores.argmax(-1)
    across = scores.t()  # where scores lie column by column, [V, M] is what amax runs through in order
    if across.is_contiguous():
        tops = across[: blocks * BLOCK].unflatten(0, (blocks, BLOCK)).amax(1).t()
    else:
        tops = scores[:, : blocks * BLOCK].unflatten(-1, (blocks, BLOCK)).amax(-1)
    if vocab % BLOCK:
        tops = torch.cat([tops, scores[:, blocks * BLOCK :].amax(-1, keepdim=True)], dim=-1)
    start = tops.argmax(-1, keepdim=True) * BLOCK
    place = (start + torch.arange(BLOCK)).clamp_max(vocab - 1)
    found: Tensor = start[:, 0] + scores.gather(-1, place).argmax(-1)
    return found


def perturbed(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """Scores whose largest entry is a sample: logits / temperature plus Gumbel noise."""
    if temperature == 0:
        return logits
    noise = torch.empty_like(logits).exponential_(generator=generator)
    return logits / temperature - noise.clamp_min_(torch.finfo(noise.dtype).tiny).log_()


class _Steps(Protocol):
    def step(self, tokens: Tensor) -> Tensor:
        """tokens [M] to their states [M, H]."""

    def keep(self, branches: Tensor) -> None:
        """Go on with these of the M branches."""


def _own_nodes(trunk: Nodes, positions: Tensor, steps: int) -> Nodes:
    """[M, steps]: each branch's tokens to come, as window 0 of a row of its own."""
    before = positions[:, 1:] - 1
    order = torch.arange(steps, device=positions.device).expand(positions.shape[0], steps)
    position = trunk.position[positions[:, 0]].gather(1, before) + 1 + order
    return Nodes(torch.zeros_like(order), order, before.expand_as(order), position, torch.ones_like(order, dtype=torch.bool))


class _SharedSteps:
    def __init__(self, decoder: Decoder, found: Prefill, positions: Tensor, steps: int) -> None:
        from topd.branching.caches import shared_cache

        row = positions[:, 0]
        self.decoder, self.done = decoder, 0
        self.rows, self.columns = found.hidden.shape[0], int(positions[:, 1].max())
        self.places = Places.of(row, self.rows)
        self.cache = shared_cache(found, self.columns, self.places, steps)
        trunk = found.trunk.columns(0, self.columns)
        self.nodes = trunk.pick(row).join(_own_nodes(found.trunk, positions, steps))
        self.dtype = found.hidden.dtype

    def step(self, tokens: Tensor) -> Tensor:
        at = self.columns + self.done
        queries, keys = self.nodes.columns(at, at + 1), self.nodes.columns(0, at + 1)
        mask = attention_masks(queries, keys, self.decoder.sliding, self.dtype)
        self.done += 1
        return self.decoder.states(tokens.unsqueeze(-1), mask, queries.position, self.cache)[:, 0]

    def keep(self, branches: Tensor) -> None:
        self.nodes = self.nodes.pick(branches)
        self.places = Places.of(self.places.row[branches], self.rows)
        for layer in self.cache.layers:
            layer.keep(branches, self.places)


class _TreeSteps:
    def __init__(self, decoder: Decoder, found: Prefill, positions: Tensor, steps: int) -> None:
        from topd.branching.caches import tree_cache

        places = Places.of(positions[:, 0], found.hidden.shape[0])
        m = positions.shape[0]
        self.slot = torch.arange(m, device=positions.device) if places.slot is None else places.slot
        self.decoder, self.done = decoder, 0
        self.shape, self.columns = (places.rows, places.most), int(positions[:, 1].max())
        self.cache = tree_cache(found, self.columns, places.most * steps)
        self.nodes = found.trunk.columns(0, self.columns).join(self._own(found.trunk, positions, steps))
        self.dtype = found.hidden.dtype

    def _own(self, trunk: Nodes, positions: Tensor, steps: int) -> Nodes:
        """[B, steps n]: first every branch's first token, then every branch's second; empty places see themselves."""
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
        at = self.columns + self.done * most
        queries, keys = self.nodes.columns(at, at + most), self.nodes.columns(0, at + most)
        mask = attention_masks(queries, keys, self.decoder.sliding, self.dtype)
        self.done += 1
        table = tokens.new_zeros(rows * most).index_copy_(0, self.slot, tokens).view(rows, most)
        states = self.decoder.states(table, mask, queries.position, self.cache)
        return states.reshape(rows * most, -1)[self.slot]

    def keep(self, branches: Tensor) -> None:
        self.slot = self.slot[branches]


@torch.no_grad()
def decode(
    decoder: Decoder,
    found: Prefill,
    positions: Tensor,
    *,
    horizon: int,
    temperature: float,
    generator: torch.Generator | None,
    ends: list[int],
    vocab: int,
) -> tuple[Tensor, Tensor]:
    """A window from each position, by branching.

    Args:
        found: the pass over the rollouts, with its cache.
        positions: [m, 2] int64 (row, column), column >= 1, any order.
        ends: the end-of-sequence tokens; may be empty.
        vocab: only ids below it are drawn.

    Returns:
        tokens [m, horizon] int64, 0 past a window's end, and lengths [m] int64, an end-of-sequence token counted.
    """
    found = found.constant()
    order = positions[:, 0].argsort(stable=True)
    positions, inverse = positions[order], order.argsort()
    tokens = positions.new_zeros(positions.shape[0], horizon)
    lengths = positions.new_zeros(positions.shape[0])
    running = torch.arange(positions.shape[0], device=positions.device)  # the windows that the rows of `hidden` belong to
    alive = torch.ones_like(running, dtype=torch.bool)
    stops = torch.tensor(ends, dtype=torch.int64, device=positions.device)
    way = _SharedSteps if decoder.model.config._attn_implementation == "sdpa" else _TreeSteps
    steps: _Steps | None = None
    hidden = found.hidden[positions[:, 0], positions[:, 1] - 1]
    for place in range(horizon):
        drawn = draw(decoder.logits(hidden, vocab), temperature, generator)
        tokens[running, place] = torch.where(alive, drawn, 0)
        lengths[running] += alive
        if ends:
            alive = alive & ~torch.isin(drawn, stops)
            left = int(alive.sum())
            if not left:
                break
            if left <= REPACK * alive.numel():
                kept = alive.nonzero()[:, 0]
                running, alive, drawn = running[kept], alive[kept], drawn[kept]
                if steps is None:
                    steps = way(decoder, found, positions[running], horizon - 1)
                else:
                    steps.keep(kept)
        if place + 1 < horizon:
            steps = steps or way(decoder, found, positions[running], horizon - 1)
            hidden = steps.step(drawn)
    return tokens[inverse], lengths[inverse]
