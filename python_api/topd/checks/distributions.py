"""Checks of a few probabilities for each row: soft targets, and a teacher's top-k. They read values, so they run where
`checks_values` says so."""

import torch
from torch import Tensor

from topd.checks.values import FLOATING, check_constant, check_tensor

SUM_TOLERANCE = 1e-3


def checks_values(where: Tensor) -> bool:
    """Tell whether values are checked: on the CPU alone, and not inside torch.compile; elsewhere the check would stall or break
    it."""
    return where.device.type == "cpu" and not torch.compiler.is_compiling()


def check_like_ids(name: str, value: object, ids: Tensor) -> Tensor:
    """Check a constant floating tensor with an entry for each id."""
    shape = (ids.shape, "an entry for each id")
    checked = check_tensor(name, value, dtype=FLOATING, shape=shape, device=(ids.device, "the ids"))
    check_constant(name, checked)
    return checked


def _first_bad(bad: Tensor, *, of: Tensor) -> str:
    """Return the value at the first bad place, and where that is, in words."""
    place = tuple(bad.nonzero()[0].tolist())
    return f"{of[place].item():.6g} at index {list(place)}"


def check_ids_in_vocabulary(name: str, ids: Tensor, counts: Tensor, vocab: int) -> None:
    """Check the ids that count, those of unmasked rows and a probability that is not 0."""
    if (bad := counts & ((ids < 0) | (ids >= vocab))).any():
        raise ValueError(
            f"{name} must lie in [0, {vocab}), the rows of head.weight, where the row is unmasked and the probability is not "
            f"0, got {_first_bad(bad, of=ids)}"
        )


def check_targets(name: str, probs: Tensor, mask: Tensor | None, *, normalize: bool) -> None:
    """Check rows of probabilities, which are 0 where masked: finite, >= 0, with a sum of 1, or > 0 to be normalised."""
    total = probs.sum(-1)
    if (bad := ~(probs >= 0) | probs.isinf()).any():
        raise ValueError(f"{name} must be finite and >= 0, got {_first_bad(bad, of=probs)}")
    counts = torch.ones_like(total, dtype=torch.bool) if mask is None else mask
    if normalize and (bad := counts & (total == 0)).any():
        raise ValueError(f"{name} must have a sum > 0 in each row to be normalised, got {_first_bad(bad, of=total)}")
    if not normalize and (bad := counts & ~((total - 1).abs() <= SUM_TOLERANCE)).any():
        raise ValueError(
            f"{name} must sum to 1 within {SUM_TOLERANCE:g} in each row, got {_first_bad(bad, of=total)}; pass "
            "normalize=True to divide by the sum, or mask such rows out"
        )


def check_topk_values(ids_name: str, ids: Tensor, logprobs_name: str, logprobs: Tensor) -> None:
    """Check rows of a top-k, which are -inf where masked: no NaN, no more mass than 1, no token twice."""
    if (bad := logprobs.isnan()).any():
        raise ValueError(f"{logprobs_name} must not be NaN, got {_first_bad(bad, of=logprobs)}")
    mass = logprobs.exp().sum(-1)
    if (bad := mass > 1 + SUM_TOLERANCE).any():
        raise ValueError(
            f"{logprobs_name} must be log-probabilities whose exponentials sum to at most 1 + {SUM_TOLERANCE:g} in each row, "
            f"got {_first_bad(bad, of=mass)}; are they logits?"
        )
    padding = logprobs.isneginf()
    ordered, order = ids.masked_fill(padding, -1).sort(dim=-1, stable=True)
    repeats = torch.zeros_like(padding).scatter(-1, order[..., 1:], ordered[..., 1:] == ordered[..., :-1])
    if (bad := repeats & ~padding).any():
        raise ValueError(f"{ids_name} must be distinct in each row, got a repeated {_first_bad(bad, of=ids)}")
