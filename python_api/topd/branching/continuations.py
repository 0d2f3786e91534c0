"""One model's windows from given positions, by the way that the model allows."""

from typing import NamedTuple

import torch
from torch import Tensor

from topd.branching.decode import decode
from topd.branching.generate import generate
from topd.branching.noise import Followed, Noise, point_keys
from topd.branching.prefill import Prefill, prefill
from topd.head import Head
from topd.models.decoder import Decoder
from topd.models.sampling import Sampling
from topd.models.split_logits import together
from topd.options import WindowNoise

BRANCHES, ROLLOUT, GENERATE = "branches", "rollout", "generate: "


class Continuations(NamedTuple):
    """One model's windows."""

    tokens: Tensor  # [m, K] int64, 0 past the lengths
    lengths: Tensor  # [m] int64
    way: str  # "branches", "rollout", or "generate: " and why


@torch.no_grad()
def continue_from(
    decoder: Decoder,
    input_ids: Tensor,
    attended: Tensor,
    positions: Tensor,
    sampling: Sampling,
    *,
    prefix: Prefill | None = None,
    noise: Noise | None = None,
) -> Continuations:
    """Continue the prefix before each position.

    Args:
        input_ids, attended: [B, T], the rollouts.
        positions: [m, 2] int64 (row, column), column >= 1, any order.
        prefix: a pass over the rollouts; where it has a cache, the windows grow from that.
        noise: of these windows, in their order; None: the generator's. Where it follows the rollouts, no window goes on after
            one that stops without an end-of-sequence token.
    """
    with decoder.in_step():
        return _continue_from(decoder, input_ids, attended, positions, sampling, prefix, noise)


def _continue_from(
    decoder: Decoder,
    input_ids: Tensor,
    attended: Tensor,
    positions: Tensor,
    sampling: Sampling,
    prefix: Prefill | None,
    noise: Noise | None,
) -> Continuations:
    """Continue the prefix before each position, as often as this process has positions."""
    way = GENERATE + decoder.obstacle if decoder.obstacle else BRANCHES
    if not positions.numel():
        return Continuations(positions.new_zeros(0, sampling.horizon), positions.new_zeros(0), way)
    followed = None if noise is None else noise.followed
    if decoder.obstacle:
        windows = generate(decoder, input_ids, attended, positions, sampling, noise)
    else:
        with decoder.cache_allowed():
            if prefix is None or prefix.layers is None:
                columns = int(positions[:, 1].max()) if followed is None else input_ids.shape[1]
                prefix = prefill(decoder, input_ids[:, :columns], attended[:, :columns], cache=True)
            windows = decode(decoder, prefix, positions, sampling, noise)
    return Continuations(*(windows if followed is None else followed.cut(*windows, sampling.ends)), way)


def noise_of(
    name: WindowNoise,
    input_ids: Tensor,
    attended: Tensor,
    positions: Tensor,
    generator: torch.Generator | None,
    head: Head | None = None,
) -> Noise | None:
    """Return the noise of both models' windows, whose seed is one number of the generator's, of rank 0 where several processes
    share the student's `head`; None: each draws its own."""
    if name == "independent" or not positions.numel():
        return None
    seed = torch.empty((), dtype=torch.int64, device=positions.device).random_(generator=generator)
    return Noise(point_keys(seed if head is None else together(head, seed), input_ids, attended, positions))


def given_rollout(
    noise: Noise | None, student: Decoder, states: Prefill, positions: Tensor, rollout: Continuations, temperature: float
) -> Noise | None:
    """Return the noise given that the student chose the rollout's tokens.

    Args:
        states: the student's pass over the rollouts.
        rollout: of `from_rollout`.
        temperature: > 0, at which the rollouts were sampled.
    """
    if noise is None:
        return None
    columns = _rollout_columns(states.attended, positions, rollout.tokens.shape[1], -1)
    hidden = states.hidden.detach()
    return Noise(noise.points, Followed(student, hidden, positions, columns, rollout.tokens, rollout.lengths, temperature))


def from_rollout(
    input_ids: Tensor, attended: Tensor, positions: Tensor, horizon: int, response: Tensor | None = None
) -> Continuations:
    """Take the rollout's own next tokens: windows end at its last attended column, or where the response does.

    Args:
        response: [B, T] bool, True at every position: a window goes on to the next attended column where it is False, or to
            the end; None: to the end.
    """
    row, column = positions.unbind(-1)
    place = attended.long().cumsum(-1)
    end = place[:, -1:] + 1
    if response is not None:  # of each column the place of the next attended one that is no response
        end = torch.where(attended & ~response, place, end).flip(-1).cummin(-1).values.flip(-1)
    left = end.expand_as(place)[row, column] - place[row, column]
    lengths = left.clamp_max(horizon)
    tokens = input_ids[row.unsqueeze(-1), _rollout_columns(attended, positions, horizon, 0)]
    counted = torch.arange(horizon, device=positions.device) < lengths.unsqueeze(-1)
    return Continuations(tokens.masked_fill(~counted, 0), lengths, ROLLOUT)


def rollout_states(prefix: Prefill, positions: Tensor, lengths: Tensor, width: int) -> Tensor:
    """Return [m, width, H], the rollouts' states that predict the tokens of `from_rollout`; 0 past the lengths."""
    states = prefix.hidden[positions[:, :1], _rollout_columns(prefix.attended, positions, width, -1)]
    counted = torch.arange(width, device=positions.device) < lengths.unsqueeze(-1)
    return torch.where(counted.unsqueeze(-1), states, 0.0)


def _rollout_columns(attended: Tensor, positions: Tensor, width: int, shift: int) -> Tensor:
    """Return [m, width]: the attended columns from each position on, counted from `shift` of them further."""
    row, column = positions.unbind(-1)
    order = (~attended).byte().argsort(dim=-1, stable=True)  # the attended columns first
    first = attended.long().cumsum(-1)[row, column] - 1 + shift
    place = first.unsqueeze(-1) + torch.arange(width, device=positions.device)
    return order[row].gather(-1, place.clamp_max(attended.shape[1] - 1))
