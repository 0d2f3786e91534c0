"""From the loss of each token to the loss of a batch, padded [B, T] or packed [N]."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from topd.checks.values import keepable, real


class Responses(Protocol):
    """What a reduction asks of a batch."""

    @property
    def response(self) -> Tensor:
        """Bool, [B, T] or [N]: which tokens count."""

    def counts(self) -> Tensor:
        """Return [B] int64: the response tokens of each sequence."""

    def siblings(self) -> Tensor:
        """Return the response tokens of each token's sequence, at least 1, in a shape that broadcasts to the tokens'."""


class Reduced(NamedTuple):
    """A batch's loss, and its share of the larger batch whose denominator was given (1 without)."""

    loss: Tensor
    share: Tensor


def reduce_tokens(
    loss: Tensor, batch: Responses, reduction: str, num_items: float | Tensor | None, weights: Tensor | None = None
) -> Reduced:
    """Return the mean over response tokens ("token"), or over responses of their mean ("sequence").

    Args:
        loss: of each token, 0 where it does not count.
        num_items: the denominator of a larger batch; None: this batch's own.
        weights: shaped as loss, taken in its dtype; they never enter the denominator.
    """
    if weights is not None:
        weights = weights.to(loss.dtype)
        loss = torch.where(weights == 0, 0.0, loss * weights)  # an infinite token that weighs nothing adds nothing
    total = loss.sum() if reduction == "token" else (loss / batch.siblings()).sum()
    own = own_items(batch, reduction).clamp_min(1).to(loss.dtype)
    denominator = own if num_items is None else num_items
    if isinstance(denominator, Tensor):
        denominator = denominator.to(loss.device)
    return Reduced(total / denominator, own / denominator)


def own_items(batch: Responses, reduction: str) -> Tensor:
    """Return [] int64, a batch's own denominator: its response tokens, or its responses that are not empty."""
    return batch.response.sum() if reduction == "token" else (batch.counts() > 0).sum()


def reduction_hint(batch: Responses, reduction: str, weights: Tensor | None = None) -> Tensor | None:
    """Return what `reduce_tokens` will multiply each token's loss by, up to one factor, [B, T] or [N]; None where that is the
    same for all."""
    if reduction == "token":
        return weights
    shares = (1.0 / batch.siblings()).expand(batch.response.shape)
    return shares if weights is None else weights * shares


def check_items(num_items: object) -> float | Tensor | None:
    """Check the denominator of a larger batch, and return it."""
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise ValueError(f"num_items must be one number, got {list(num_items.shape)}; sum it over the batch")
        if num_items.device.type == "cpu":
            _positive(num_items.item())
        return keepable(num_items.reshape(()))
    return None if num_items is None else _positive(num_items)


def _positive(num_items: object) -> float:
    hint = "where a step may have no response token, take max(num_items, 1)"
    return real("num_items", num_items, low=0.0, open_low=True, hint=hint)
