"""Gumbel noise that both models' windows share: a function of the seed, the point, the step and the token alone.

A model draws the token argmax_v(log p(v) + g_v), with g_v standard Gumbel noise. Models that use the same g say the same where
they agree, and each still follows its own distribution exactly. That is "shared" noise.

"counterfactual" noise is drawn given that the student chose the rollout's token y: what would the teacher have said with the
same luck? With phi = log p_S, Z ~ Gumbel(0), G_y = Z, G_v = -log(exp(-Z) + exp(-(phi_v + Gumbel_v))) for v != y, the noise is
g_v = G_v - phi_v. It is computed as the exponential that stands for it, E_v = exp(-g_v), which has no extremes:

    E_v = [v != y] exp(-Gumbel_v) + p_S(v) exp(-Z)

exp(-Gumbel) is a standard exponential. (E_v / p_S(v) is the time at which v arrives in a race of the tokens that the least time
wins: y arrives first, and what the others still wait for has forgotten how long that took.) Over rollouts that the student
sampled, g is again standard Gumbel noise.

A point is known by what its row says, all attended tokens, and by its place among them: not by the order in the batch, the
padding or the other rows. Points that have the same key are numbered in their order, so that their noise differs.

Sources: Maddison, Tarlow, Minka 2014, "A* Sampling" (top-down truncated Gumbels); Oberst, Sontag 2019, "Counterfactual
Off-Policy Evaluation with Gumbel-Max Structural Causal Models"; Steele, Lea, Flood 2014, "Fast Splittable Pseudorandom Number
Generators" (splitmix64). The TOPD paper has none of this: the use here is ours.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from topd.models.decoder import Decoder
from topd.models.sampling import most_likely

# splitmix64: the step of its counter, and the shifts and factors of its mix. torch's int64 wraps around, as its uint64 does.
STEP = 0x9E3779B97F4A7C15 - (1 << 64)
MIX = ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)), (31, 1))
# Entries [windows, V] whose noise is made at once: 32 MiB a tensor.
ENTRIES = 1 << 22


def mixed(bits: Tensor) -> Tensor:
    """Return 64 bits that look random, a one-to-one function of those given."""
    bits = bits.clone()
    for shift, factor in MIX:
        bits ^= (bits >> shift).bitwise_and_((1 << (64 - shift)) - 1)
        bits *= factor
    return bits


def exponentials(keys: Tensor, counters: Tensor) -> Tensor:
    """Return standard exponential noise, float64 > 0, of shape keys + counters; both int64, broadcast."""
    bits = mixed(keys + counters * STEP)
    uniform = (bits >> 12).bitwise_and_((1 << 52) - 1).double()
    return uniform.add_(0.5).mul_(2.0**-52).log_().neg_()  # 0 < uniform < 1, both exactly


def point_keys(seed: Tensor, input_ids: Tensor, attended: Tensor, positions: Tensor) -> Tensor:
    """Return the key of each point, [m] int64.

    Args:
        seed: [] int64.
        input_ids, attended: [B, T], the rollouts.
        positions: [m, 2] int64 (row, column).
    """
    place = attended.long().cumsum(-1)
    said = torch.where(attended, mixed(mixed(input_ids) + place * STEP), 0).sum(-1)
    row, column = positions.unbind(-1)
    keys = mixed(mixed(said[row] ^ seed) + place[row, column] * STEP)
    ordered, order = keys.sort(stable=True)
    index = torch.arange(keys.numel(), device=keys.device)
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[1:] = ordered[1:] != ordered[:-1]
    number = torch.empty_like(keys)
    number[order] = index - torch.where(new, index, 0).cummax(0).values
    return mixed(keys + number * STEP)


@dataclass(frozen=True, eq=False)
class Followed:
    """The rollout's own tokens from each of m points on, and the student's states that predict them.

    Attributes:
        student: its decoder.
        states: [B, T, H], the student's pass over the rollouts, constant.
        positions: [m, 2] int64 (row, column).
        columns: [m, K] int64, of the states that predict the tokens.
        tokens: [m, K] int64; lengths: [m] int64.
        temperature: > 0, at which the rollouts were sampled.
    """

    student: Decoder
    states: Tensor
    positions: Tensor
    columns: Tensor
    tokens: Tensor
    lengths: Tensor
    temperature: float

    def chosen(self, windows: Tensor, step: int, vocab: int) -> tuple[Tensor, Tensor]:
        """Return the rollout's tokens of a step [M], vocab where there is none below it, and the student's logits [M, vocab],
        divided by the temperature."""
        tokens = self.tokens[windows, step]
        known = (step < self.lengths[windows]) & (tokens < vocab)
        states = torch.where(known.unsqueeze(-1), self._at(self.states, windows, step), 0.0)
        return torch.where(known, tokens, vocab), self.student.logits(states, vocab) / self.temperature

    def over_rollout(self, states: Tensor, teacher: Tensor, windows: Tensor, said: Tensor) -> Tensor:
        """Return the teacher's states [M, H] of the next step: of its pass over the rollouts [B, T, H] where a window has said
        the same as the rollout so far. Rounding is then the student's own, and equal models agree in every dtype.

        Args:
            states: [M, H], otherwise.
            said: [M, i] int64, the windows' tokens so far.
        """
        step = said.shape[1]
        same = (said == self.tokens[windows, :step]).all(-1) & (step < self.lengths[windows])
        return torch.where(same.unsqueeze(-1), self._at(teacher, windows, step), states)

    def cut(self, tokens: Tensor, lengths: Tensor, ends: list[int]) -> tuple[Tensor, Tensor]:
        """Return windows [m, K] and their lengths [m], no longer than a rollout that stops without an end-of-sequence token."""
        last = self.tokens.gather(1, self.lengths.unsqueeze(-1) - 1)[:, 0]
        ended = torch.isin(last, torch.tensor(ends, dtype=torch.int64, device=last.device))
        lengths = torch.where(ended, lengths, torch.minimum(lengths, self.lengths))
        past = torch.arange(tokens.shape[1], device=tokens.device) >= lengths.unsqueeze(-1)
        return tokens.masked_fill(past, 0), lengths

    def _at(self, states: Tensor, windows: Tensor, step: int) -> Tensor:
        """Return the states [M, H] before the rollout's token of a step."""
        return states[self.positions[windows, 0], self.columns[windows, step]]


@dataclass(frozen=True, eq=False)
class Noise:
    """Noise of m windows, the same for both models.

    Attributes:
        points: [m] int64, the windows' keys.
        followed: the rollouts given which it is drawn; None: given nothing.
    """

    points: Tensor
    followed: Followed | None = None

    def choose(self, logits: Tensor, windows: Tensor, step: int) -> Tensor:
        """Draw one token for each of these windows.

        Args:
            logits: [M, V], divided by the temperature.
            windows: [M] int64, which of the m windows they are of.
            step: from 0 on.

        Returns:
            [M] int64.
        """
        rows, vocab = logits.shape
        counters = torch.arange(1, vocab + 1, device=logits.device)
        keys = mixed(self.points[windows] + step).unsqueeze(-1)
        given = None if self.followed is None else self.followed.chosen(windows, step, vocab)
        drawn, most = [], max(1, ENTRIES // vocab)
        for start in range(0, rows, most):
            these = slice(start, start + most)
            times = exponentials(keys[these], counters)
            if given is not None:
                times = _after(times, keys[these], *(each[these] for each in given))
            drawn.append(most_likely(logits[these] - times.log_()))
        return torch.cat(drawn)


def _after(times: Tensor, keys: Tensor, tokens: Tensor, logits: Tensor) -> Tensor:
    """Return the exponentials [M, V], float64, given that a student with these logits [M, V] chose these tokens [M]; V stands
    for one that is not known, where they stay as they are. keys: [M, 1]."""
    vocab = times.shape[1]
    first = exponentials(keys, torch.zeros_like(keys))
    known = (tokens < vocab).unsqueeze(-1)
    place = tokens.clamp_max(vocab - 1).unsqueeze(-1)
    times.scatter_(1, place, torch.where(known, 0.0, times.gather(1, place)))
    times += logits.double().softmax(-1) * torch.where(known, first, 0.0)
    return times.clamp_min_(torch.finfo(times.dtype).tiny)
