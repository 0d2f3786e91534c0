"""The KL to soft targets from full distributions, and random such targets."""

import torch
from compare import Model, Outcome, outcome_of

import topd

N, V, M = 11, 41, 6


def full_kl(model: Model, ids: torch.Tensor, probs: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Return sum q (log q - log p) over the whole vocabulary, repeats added up; entries of probability 0 are not read."""
    logits = model.logits()
    logprobs = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).log_softmax(-1)
    index = ids.masked_fill(probs == 0, 0)
    q = torch.zeros_like(logprobs).scatter_add(-1, index, probs.to(logprobs.dtype))
    return (torch.special.xlogy(q, q) - q * logprobs).sum(-1)


def truth(model: Model, ids, probs, *, mask=None, dtype: torch.dtype | None = torch.float64, **options) -> Outcome:
    def compute(leaves: Model) -> torch.Tensor:
        value = full_kl(leaves, ids, probs, **options)
        return value if mask is None else value.masked_fill(~mask, 0.0)

    return outcome_of(model, dtype, compute)


def by_topd(model: Model, ids, probs, **options) -> Outcome:
    return outcome_of(model, None, lambda leaves: topd.soft_target_kl(leaves.hidden, leaves.head(), ids, probs, **options))


def random_targets(*shape: int, vocab: int = V) -> tuple[torch.Tensor, torch.Tensor]:
    """Return distinct ids and float64 probabilities; the last entry of every second row is padding with the id -100."""
    ids = torch.rand(*shape[:-1], vocab).argsort(-1)[..., : shape[-1]]
    probs = torch.rand(*shape, dtype=torch.float64)
    probs.view(-1, shape[-1])[::2, -1] = 0
    ids.view(-1, shape[-1])[::2, -1] = -100
    return ids, probs / probs.sum(-1, keepdim=True)
