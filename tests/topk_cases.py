"""The KL with a teacher of whom k tokens a row are known, from full distributions; and random such teachers."""

import itertools
import math

import pytest
import torch
from compare import Model, Outcome, outcome_of

import topd

N, V, K = 11, 41, 6
DIRECTIONS, SUPPORTS = ("forward", "reverse"), ("raw", "renormalised", "tail")
COMBINATIONS = list(itertools.product(DIRECTIONS, SUPPORTS))
every_combination = pytest.mark.parametrize(("direction", "support"), COMBINATIONS, ids=map("-".join, COMBINATIONS))
both_directions = pytest.mark.parametrize("direction", DIRECTIONS)


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Return sum p log(p / q) over the entries with p > 0."""
    counts = p > 0
    return torch.where(counts, p * (p.where(counts, 1.0).log() - q.where(counts, 1.0).log()), 0.0).sum(-1)


def from_probabilities(model: Model, ids, logprobs, *, direction, support, temperature=1.0, teacher_tail=None) -> torch.Tensor:
    """Return the definition on full distributions, without entries of -inf; the teacher's tail is 1 - sum unless given."""
    logits = model.logits()
    p = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).softmax(-1)
    given, index = ~logprobs.isneginf(), ids.masked_fill(logprobs.isneginf(), 0)
    t, s = logprobs.to(p.dtype).exp(), p.gather(-1, index).where(given, 0.0)
    if support == "renormalised":
        t, s = t / t.sum(-1, keepdim=True), s / s.sum(-1, keepdim=True)
    if support == "tail":
        known = torch.zeros_like(p, dtype=torch.int64).scatter_add(-1, index, given.long()) > 0
        rest = (1 - t.sum(-1)).clamp_min(0) if teacher_tail is None else teacher_tail
        t, s = torch.cat([t, rest.unsqueeze(-1)], -1), torch.cat([s, p.masked_fill(known, 0.0).sum(-1, keepdim=True)], -1)
    return kl(t, s) if direction == "forward" else kl(s, t)


def truth(model: Model, ids, logprobs, *, mask=None, dtype: torch.dtype | None = torch.float64, **options) -> Outcome:
    def compute(leaves: Model) -> torch.Tensor:
        value = from_probabilities(leaves, ids, logprobs, **options)
        return value if mask is None else value.masked_fill(~mask, 0.0)

    return outcome_of(model, dtype, compute)


def by_topd(model: Model, ids, logprobs, **options) -> Outcome:
    return outcome_of(model, None, lambda leaves: topd.topk_divergence(leaves.hidden, leaves.head(), ids, logprobs, **options))


def random_teacher(*shape: int, vocab: int = V) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and float64 log-probabilities of a distribution's k likeliest; every second row's last entry is padding."""
    logprobs, ids = (2 * torch.randn(*shape[:-1], vocab, dtype=torch.float64)).log_softmax(-1).topk(shape[-1], dim=-1)
    logprobs.view(-1, shape[-1])[::2, -1] = -math.inf
    ids.view(-1, shape[-1])[::2, -1] = -100
    return ids, logprobs
