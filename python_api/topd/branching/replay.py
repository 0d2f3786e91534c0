"""The student over its windows' tokens, with gradient: the states that predict each of them."""

import torch
from torch import Tensor

from topd.branching.nodes import Nodes, attention_masks, number_within
from topd.branching.prefill import Prefill
from topd.models.decoder import Decoder, position_ids_of
from topd.models.sampling import batches, prefixes

# The most of one forward: tokens of windows in a row, which all attend to one another's places, and entries of its mask.
GROUP_TOKENS, GROUP_ENTRIES = 1024, 1 << 25


def replay(decoder: Decoder, prefix: Prefill, positions: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
    """Return the states that predict the windows' tokens, by the way that the model and its pass over the rollouts allow.

    From the pass's cache, where it has one; a model that cannot branch goes over every prefix again; one that may keep no cache
    (gradient checkpointing) reads each group of windows in one forward with its rollouts.

    Args:
        prefix: the pass over the rollouts; gradients go through it where it has them.
        positions: [m, 2] int64 (row, column), column >= 1.
        tokens: [m, K] int64; lengths: [m] int64 in [1, K].

    Returns:
        [m, K, H]; index i predicts token i; 0 past the lengths. Where processes shard the model all of them call this, also one
        without windows, and make a backward pass through the result.
    """
    with decoder.in_step() as step:
        if not tokens.numel():
            states = prefix.hidden.new_zeros(*tokens.shape, prefix.hidden.shape[-1])
        elif prefix.layers is not None:
            states = _over_cache(decoder, prefix, positions, tokens, lengths)
        else:
            way = _separately if decoder.obstacle else _in_one_pass
            states = way(decoder, prefix, positions, tokens, lengths)
    return states + step.zero if isinstance(step.zero, Tensor) else states


def _over_cache(decoder: Decoder, prefix: Prefill, positions: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
    """Replay the windows over the cache of the pass, each group in one forward."""
    from topd.branching.caches import prefix_cache

    assert prefix.layers is not None
    inputs = int(lengths.max()) - 1
    first = prefix.hidden[positions[:, 0], positions[:, 1] - 1].unsqueeze(1)
    groups, pieces = _groups(positions, prefix.hidden.shape[1], inputs), []
    for chosen in groups:
        if not inputs:
            pieces.append(first[chosen])
            continue
        own, rows, start = _own_table(prefix.trunk, positions[chosen], lengths[chosen], inputs)
        trunk = prefix.trunk.pick(rows)
        mask = attention_masks(own, trunk.join(own), decoder.sliding, prefix.hidden.dtype)
        whole = rows.numel() == prefix.hidden.shape[0]
        layers = prefix.layers if whole else [(keys[rows], values[rows]) for keys, values in prefix.layers]
        ids = _into_table(tokens[chosen, :inputs], start, own)
        states = decoder.states(ids, mask, own.position, prefix_cache(layers))
        pieces.append(torch.cat([first[chosen], _from_table(states, start, inputs)], dim=1))
    return _assemble(groups, pieces, lengths, tokens.shape[1])


def _in_one_pass(decoder: Decoder, prefix: Prefill, positions: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
    """Replay each group of windows behind its rollouts, in one forward with one mask."""
    inputs, columns = int(lengths.max()) - 1, prefix.input_ids.shape[1]
    dtype = decoder.head.weight.dtype
    groups, pieces = _groups(positions, columns, inputs), []
    for chosen in groups:
        own, rows, start = _own_table(prefix.trunk, positions[chosen], lengths[chosen], inputs)
        nodes = prefix.trunk.pick(rows).join(own)
        ids = torch.cat([prefix.input_ids[rows], _into_table(tokens[chosen, :inputs], start, own)], dim=1)
        states = decoder.states(ids, attention_masks(nodes, nodes, decoder.sliding, dtype), nodes.position)
        place = torch.searchsorted(rows, positions[chosen, 0].contiguous())
        first = states[place, positions[chosen, 1] - 1].unsqueeze(1)
        pieces.append(torch.cat([first, _from_table(states[:, columns:], start, inputs)], dim=1))
    return _assemble(groups, pieces, lengths, tokens.shape[1])


def _separately(decoder: Decoder, prefix: Prefill, positions: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
    """Replay every window behind a copy of its prefix, in left-padded batches."""
    groups, pieces = batches(positions, tokens.shape[1]), []
    for chosen in groups:
        ids, mask = prefixes(prefix.input_ids, prefix.attended, positions[chosen])
        columns, inputs = ids.shape[1], int(lengths[chosen].max()) - 1
        counted = torch.arange(inputs, device=ids.device) < lengths[chosen].unsqueeze(-1) - 1
        ids = torch.cat([ids, tokens[chosen, :inputs].masked_fill(~counted, 0)], dim=1)
        mask = torch.cat([mask, counted], dim=1)
        pieces.append(decoder.states(ids, mask.long(), position_ids_of(mask))[:, columns - 1 :])
    return _assemble(groups, pieces, lengths, tokens.shape[1])


def _groups(positions: Tensor, columns: int, inputs: int) -> list[Tensor]:
    """Return the indices of windows that go together: of every rollout the first few, then the next."""
    number = number_within(positions[:, 0])
    rows = positions[:, 0].unique().numel()
    most = max(1, GROUP_TOKENS // max(inputs, 1))
    while most > 1 and rows * most * inputs * (columns + most * inputs) > GROUP_ENTRIES:
        most -= 1
    return [(number // most == g).nonzero()[:, 0] for g in range(int(number.max()) // most + 1)]


def _own_table(trunk: Nodes, positions: Tensor, lengths: Tensor, inputs: int) -> tuple[Nodes, Tensor, Tensor]:
    """Return the windows' input tokens as nodes [R, n inputs], R the rollouts that they are of; those rollouts [R]; and each
    window's first place in the flat table [m]."""
    rows, row = positions[:, 0].unique(return_inverse=True)
    most = int(row.bincount().max())
    slot = row * most + number_within(row)
    before = positions[:, 1:] - 1
    place = torch.arange(inputs, device=positions.device).expand(positions.shape[0], inputs)
    position = trunk.position[positions[:, 0]].gather(1, before) + 1 + place

    def table(value: Tensor) -> Tensor:
        blank = value.new_zeros(rows.numel() * most, inputs)
        return blank.index_copy(0, slot, value.contiguous()).view(rows.numel(), most * inputs)

    window = torch.arange(most, device=positions.device).repeat_interleave(inputs).expand(rows.numel(), most * inputs)
    valid = table(place < lengths.unsqueeze(-1) - 1)
    nodes = Nodes(window, table(place), table(before.expand_as(place)), table(position), valid)
    return nodes, rows, slot * inputs


def _assemble(groups: list[Tensor], pieces: list[Tensor], lengths: Tensor, width: int) -> Tensor:
    """Return [m, width, H], put together from the groups' windows [g] and their states [g, <= width, H]; 0 past the lengths."""
    padded = [torch.nn.functional.pad(piece, (0, 0, 0, width - piece.shape[1])) for piece in pieces]
    states = torch.cat(padded)[torch.cat(groups).argsort()]
    counted = torch.arange(width, device=states.device) < lengths.unsqueeze(-1)
    return torch.where(counted.unsqueeze(-1), states, 0.0)


def _from_table(states: Tensor, start: Tensor, inputs: int) -> Tensor:
    """Return the windows' states [g, inputs, H] from the flat table."""
    return states.reshape(-1, states.shape[-1])[start.unsqueeze(-1) + torch.arange(inputs, device=start.device)]


def _into_table(tokens: Tensor, start: Tensor, own: Nodes) -> Tensor:
    """Return the windows' tokens [g, inputs] at their places of the table, 0 at those that do not count."""
    places = start.unsqueeze(-1) + torch.arange(tokens.shape[1], device=tokens.device)
    ids = tokens.new_zeros(own.order.numel()).index_copy(0, places.reshape(-1), tokens.reshape(-1))
    return torch.where(own.valid, ids.view_as(own.order), 0)
