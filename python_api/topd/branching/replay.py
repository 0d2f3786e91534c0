"""The student over its windows' tokens, with gradient: the states that predict each of them."""

import torch
from torch import Tensor

from topd.branching.generate import batches, prefixes
from topd.branching.nodes import Nodes, attention_masks, number_within
from topd.branching.prefill import Prefill, position_ids_of
from topd.models.decoder import Decoder

# Of one forward: tokens of windows in a row, which all attend to one another's places, and entries of its mask.
GROUP_TOKENS, GROUP_ENTRIES = 1024, 1 << 25


def _groups(positions: Tensor, columns: int, inputs: int) -> list[Tensor]:
    """Indices of windows that go together: of every rollout the first few, then the next."""
    number = number_within(positions[:, 0])
    rows = positions[:, 0].unique().numel()
    most = max(1, GROUP_TOKENS // max(inputs, 1))
    while most > 1 and rows * most * inputs * (columns + most * inputs) > GROUP_ENTRIES:
        most -= 1
    return [(number // most == g).nonzero()[:, 0] for g in range(int(number.max()) // most + 1)]


def _own_table(trunk: Nodes, positions: Tensor, lengths: Tensor, inputs: int) -> tuple[Nodes, Tensor, Tensor]:
    """The windows' input tokens as nodes [R, n inputs], R the rollouts that they are of; those rollouts [R]; and each window's
    first place in the flat table [m]."""
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
    """[m, width, H] of the groups' windows [g] and their states [g, <= width, H]; 0 past the lengths."""
    padded = [torch.nn.functional.pad(piece, (0, 0, 0, width - piece.shape[1])) for piece in pieces]
    found = torch.cat(padded)[torch.cat(groups).argsort()]
    counted = torch.arange(width, device=found.device) < lengths.unsqueeze(-1)
    return torch.where(counted.unsqueeze(-1), found, 0.0)


def _gathered(states: Tensor, start: Tensor, inputs: int) -> Tensor:
    """[g, inputs, H] from the flat table."""
    return states.reshape(-1, states.shape[-1])[start.unsqueeze(-1) + torch.arange(inputs, device=start.device)]


def replay_over_cache(decoder: Decoder, found: Prefill, positions: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
    """The windows' states from a pass over the rollouts whose cache has gradients.

    Args:
        positions: [m, 2], m >= 1.
        tokens: [m, K] int64; lengths: [m] int64 in [1, K].

    Returns:
        [m, K, H]; index i predicts token i; 0 past the lengths.
    """
    from topd.branching.caches import prefix_cache

    assert found.layers is not None
    inputs = int(lengths.max()) - 1
    first = found.hidden[positions[:, 0], positions[:, 1] - 1].unsqueeze(1)
    groups, pieces = _groups(positions, found.hidden.shape[1], inputs), []
    for chosen in groups:
        if not inputs:
            pieces.append(first[chosen])
            continue
        own, rows, start = _own_table(found.trunk, positions[chosen], lengths[chosen], inputs)
        trunk = found.trunk.pick(rows)
        mask = attention_masks(own, trunk.join(own), decoder.sliding, found.hidden.dtype)
        whole = rows.numel() == found.hidden.shape[0]
        layers = found.layers if whole else [(keys[rows], values[rows]) for keys, values in found.layers]
        cache = prefix_cache(Prefill(found.hidden, trunk, layers))
        ids = _flat(tokens[chosen, :inputs], start, own)
        states = decoder.states(ids, mask, own.position, cache)
        pieces.append(torch.cat([first[chosen], _gathered(states, start, inputs)], dim=1))
    return _assemble(groups, pieces, lengths, tokens.shape[1])


def _flat(tokens: Tensor, start: Tensor, own: Nodes) -> Tensor:
    """The windows' tokens [g, inputs] at their places of the table, 0 at those that do not count."""
    at = start.unsqueeze(-1) + torch.arange(tokens.shape[1], device=tokens.device)
    ids = tokens.new_zeros(own.order.numel()).index_copy(0, at.reshape(-1), tokens.reshape(-1))
    return torch.where(own.valid, ids.view_as(own.order), 0)


def replay_in_one_pass(
    decoder: Decoder, input_ids: Tensor, trunk: Nodes, positions: Tensor, tokens: Tensor, lengths: Tensor
) -> Tensor:
    """The windows' states where a pass with gradients may keep no cache: each group of windows behind its rollouts, in one
    forward with one mask. Arguments and result as of `replay_over_cache`."""
    inputs, columns = int(lengths.max()) - 1, input_ids.shape[1]
    dtype = decoder.head.weight.dtype
    groups, pieces = _groups(positions, columns, inputs), []
    for chosen in groups:
        own, rows, start = _own_table(trunk, positions[chosen], lengths[chosen], inputs)
        nodes = trunk.pick(rows).join(own)
        ids = torch.cat([input_ids[rows], _flat(tokens[chosen, :inputs], start, own)], dim=1)
        states = decoder.states(ids, attention_masks(nodes, nodes, decoder.sliding, dtype), nodes.position)
        place = torch.searchsorted(rows, positions[chosen, 0].contiguous())
        first = states[place, positions[chosen, 1] - 1].unsqueeze(1)
        pieces.append(torch.cat([first, _gathered(states[:, columns:], start, inputs)], dim=1))
    return _assemble(groups, pieces, lengths, tokens.shape[1])


def replay_separately(
    decoder: Decoder, input_ids: Tensor, attended: Tensor, positions: Tensor, tokens: Tensor, lengths: Tensor
) -> Tensor:
    """The windows' states of a model that cannot branch: every prefix again, with its window, in left-padded batches. Arguments
    and result as of `replay_over_cache`."""
    groups, pieces = batches(positions, tokens.shape[1]), []
    for chosen in groups:
        ids, mask = prefixes(input_ids, attended, positions[chosen])
        columns, inputs = ids.shape[1], int(lengths[chosen].max()) - 1
        counted = torch.arange(inputs, device=ids.device) < lengths[chosen].unsqueeze(-1) - 1
        ids = torch.cat([ids, tokens[chosen, :inputs].masked_fill(~counted, 0)], dim=1)
        mask = torch.cat([mask, counted], dim=1)
        pieces.append(decoder.states(ids, mask.long(), position_ids_of(mask))[:, columns - 1 :])
    return _assemble(groups, pieces, lengths, tokens.shape[1])
