"""Diagnostics of a step: sums over its response tokens, and the numbers that follow from them.

The sums add over micro-batches and processes; only then they are divided, and only then exp is taken. A percentile has no sum:
it is read from a histogram whose counts add. Its bins are 2 % wide, from 1e-8 to 1e4 nats on either side of 0, so a percentile
is within 1 % of the true one; what is nearer to 0 than 1e-8 counts as 0.

Nothing here makes the host wait for a GPU.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

LOWEST, HIGHEST, STEP = 1e-8, 1e4, 0.02  # of |divergence|, nats; a bin is STEP wide in its logarithm
BINS = math.ceil(math.log(HIGHEST / LOWEST) / STEP)
ZERO, INFINITE = BINS, 2 * BINS + 1  # the bin of what is below LOWEST, and the one of what is infinite or NaN
PERCENTILES = {"kl_p50": 0.50, "kl_p95": 0.95, "kl_p99": 0.99}
FIELDS = (
    "tokens",
    "divergence",
    "clip_tokens",
    "clipped",
    "perplexity_tokens",
    "student_nll",
    "teacher_nll",
    "correct_tokens",
    "correct",
    "incorrect_tokens",
    "incorrect",
    "epistemic_tokens",
    "epistemic",
    "top2_tokens",
    "bimodal",
    "fragmented",
)
MEANS = {
    "kl_mean": ("divergence", "tokens"),
    "clip_share": ("clipped", "clip_tokens"),
    "kl_correct": ("correct", "correct_tokens"),
    "kl_incorrect": ("incorrect", "incorrect_tokens"),
    "epistemic_mass": ("epistemic", "epistemic_tokens"),
    "bimodal_share": ("bimodal", "top2_tokens"),
    "fragmented_share": ("fragmented", "top2_tokens"),
}
COUNTS = {"tokens_correct": "correct_tokens", "tokens_incorrect": "incorrect_tokens"}
# Which field of `Measured` a diagnostic needs; without it there is none.
NEEDS = {
    "clip_share": "clip",
    **dict.fromkeys(("kl_correct", "kl_incorrect", *COUNTS), "verdict"),
    "epistemic_mass": "epistemic_mass",
    **dict.fromkeys(("bimodal_share", "fragmented_share"), "top2"),
}
DIAGNOSTICS = (*MEANS, *COUNTS, *PERCENTILES, "kl_max", "student_perplexity", "teacher_perplexity", "perplexity_gap")
BIMODAL = 0.25  # a token of this probability and another one of it make a bimodal distribution


class TeacherTop2(NamedTuple):
    """The teacher's two most likely tokens in place of each response token: log-probabilities and ids, [B, T, 2] or [N, 2]."""

    logprobs: Tensor
    ids: Tensor


class Measured(NamedTuple):
    """What a step knows of its tokens; every tensor is [B, T] or [N] but where it says otherwise.

    Attributes:
        divergence: the configured one, nats, without cross-entropy and before any clip of a position.
        response: bool, which tokens count.
        input_ids: int64.
        student_logprob, teacher_logprob: of the token, nats; NaN: not known.
        clip: position_clip of the configuration; None: there is none.
        verdict: bool, whether the token's response is correct; None: not known.
        epistemic_mass: the teacher's probability of the epistemic tokens; None: not asked for.
        top2: the teacher's two most likely tokens; None: not asked for.
    """

    divergence: Tensor
    response: Tensor
    input_ids: Tensor
    student_logprob: Tensor
    teacher_logprob: Tensor
    clip: float | None = None
    verdict: Tensor | None = None
    epistemic_mass: Tensor | None = None
    top2: TeacherTop2 | None = None


@dataclass(frozen=True, eq=False)
class Totals:
    """Sums over the response tokens of a step, or of several, on the device of the loss.

    Attributes:
        sums: [F] float64, one for each of FIELDS.
        histogram: [2 BINS + 2] float64, how many tokens have a divergence of each bin.
        largest: scalar float64, the largest divergence; -inf where there is no token.
    """

    sums: Tensor
    histogram: Tensor
    largest: Tensor

    def plus(self, other: "Totals") -> "Totals":
        """Return the totals of both."""
        return Totals(self.sums + other.sums, self.histogram + other.histogram, torch.maximum(self.largest, other.largest))

    def flat(self) -> Tensor:
        """Return everything as one tensor, of the same size in every process."""
        return torch.cat([self.largest.reshape(1), self.sums, self.histogram])

    @classmethod
    def of_processes(cls, flat: Tensor) -> "Totals":
        """Return the totals of all processes, whose `flat` tensors are [P, n]."""
        rest = flat[:, 1:].sum(0)
        return cls(rest[: len(FIELDS)], rest[len(FIELDS) :], flat[:, 0].max())

    def metrics(self) -> dict[str, Tensor]:
        """Return the diagnostics by name, scalars; NaN: there was no token to measure."""
        fields = dict(zip(FIELDS, self.sums.unbind(), strict=True))
        values = {name: fields[part] / fields[count] for name, (part, count) in MEANS.items()}
        without_verdict = fields["correct_tokens"] + fields["incorrect_tokens"] == 0
        values |= {name: fields[count].masked_fill(without_verdict, torch.nan) for name, count in COUNTS.items()}
        values |= dict(zip(PERCENTILES, self._percentiles().unbind(), strict=True))
        values["kl_max"] = self.largest.masked_fill(fields["tokens"] == 0, torch.nan)
        for side in ("student", "teacher"):
            values[f"{side}_perplexity"] = (fields[f"{side}_nll"] / fields["perplexity_tokens"]).exp()
        values["perplexity_gap"] = values["student_perplexity"] - values["teacher_perplexity"]
        return values

    def _percentiles(self) -> Tensor:
        """Return of each of PERCENTILES the least divergence that at least this share of the tokens does not exceed."""
        below = self.histogram.cumsum(0)
        wanted = torch.stack([below[-1] * share for share in PERCENTILES.values()]).ceil().clamp_min(1)
        index = torch.searchsorted(below, wanted).clamp_max(INFINITE)
        distance = (index - ZERO).abs()
        size = LOWEST * ((distance - 0.5) * STEP).exp()
        value = torch.where(index > ZERO, size, -size).masked_fill(distance == 0, 0.0)
        value = torch.where(value > self.largest, self.largest, value)  # the middle of a bin may lie above all that is in it
        return value.masked_fill(index == INFINITE, torch.inf).masked_fill(below[-1] == 0, torch.nan)


@torch.no_grad()
def totals_of(measured: Measured) -> Totals:
    """Return the sums over the response tokens."""
    response, divergence = measured.response, measured.divergence
    student, teacher = measured.student_logprob, measured.teacher_logprob
    known = response & ~(student.isnan() | teacher.isnan())
    tokens = _sum(response, response)
    sums = {
        "tokens": tokens,
        "divergence": _sum(divergence, response),
        "perplexity_tokens": _sum(known, known),
        "student_nll": -_sum(student, known),
        "teacher_nll": -_sum(teacher, known),
    }
    if measured.clip is not None:
        sums |= {"clip_tokens": tokens, "clipped": _sum(divergence > measured.clip, response)}
    if measured.verdict is not None:
        for name, where in (("correct", response & measured.verdict), ("incorrect", response & ~measured.verdict)):
            sums |= {f"{name}_tokens": _sum(where, where), name: _sum(divergence, where)}
    if measured.epistemic_mass is not None:
        sums |= {"epistemic_tokens": tokens, "epistemic": _sum(measured.epistemic_mass, response)}
    if measured.top2 is not None:
        bimodal, fragmented = (_sum(each, response) for each in _of_top2(measured, measured.top2))
        sums |= {"top2_tokens": tokens, "bimodal": bimodal, "fragmented": fragmented}
    none = torch.zeros_like(tokens)
    fields = torch.stack([sums.get(name, none) for name in FIELDS])
    divergence = divergence.double()
    return Totals(fields, _histogram(divergence, response), _largest(divergence, response))


def diagnostics_of(measured: Measured, totals: Totals) -> dict[str, Tensor]:
    """Return the diagnostics by name, of totals of such tokens: those alone for which everything was measured."""
    absent = {name for name, field in NEEDS.items() if getattr(measured, field) is None}
    return {name: value for name, value in totals.metrics().items() if name not in absent}


def _sum(value: Tensor, where: Tensor) -> Tensor:
    """Return the sum of the values where the mask is True, a scalar, float64; of bools their number."""
    return value.masked_fill(~where, 0).sum(dtype=torch.float64)


def _of_top2(measured: Measured, top2: TeacherTop2) -> tuple[Tensor, Tensor]:
    """Return which tokens are bimodal, and which are fragmented.

    Bimodal: the teacher gives the token and its best other one 1/4 each at least. Fragmented: the teacher's first choice is
    neither this token nor the next one of the response, and is its first choice both times.
    """
    tokens = measured.input_ids
    first = top2.ids[..., 0]
    best_other = torch.where(first == tokens, top2.logprobs[..., 1], top2.logprobs[..., 0])
    bound = math.log(BIMODAL)
    bimodal = (measured.teacher_logprob >= bound) & (best_other >= bound)
    unmet = first != tokens
    fragmented = torch.zeros_like(bimodal)
    again = measured.response[..., 1:] & (first[..., :-1] == first[..., 1:])  # what follows another sequence is no response
    fragmented[..., :-1] = again & unmet[..., :-1] & unmet[..., 1:]
    return bimodal, fragmented


def _histogram(divergence: Tensor, response: Tensor) -> Tensor:
    """Return how many response tokens have a divergence of each bin."""
    size = divergence.abs()
    distance = ((size / LOWEST).log() / STEP).floor().clamp(-1, BINS - 1).nan_to_num(0.0).long() + 1
    index = ZERO + torch.where(divergence < 0, -distance, distance)
    index = index.masked_fill(~(divergence < torch.inf), INFINITE).flatten()
    counts = torch.zeros(2 * BINS + 2, dtype=torch.int64, device=divergence.device)
    return counts.index_add_(0, index, response.flatten().long()).double()


def _largest(divergence: Tensor, response: Tensor) -> Tensor:
    """Return the largest divergence of a response token; -inf where there is none."""
    lowest = divergence.new_full((1,), -torch.inf)
    return torch.cat([lowest, divergence.masked_fill(~response, -torch.inf).flatten()]).max()
