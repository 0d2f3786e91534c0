"""Logits of a head whose rows several processes hold, and tokens on which these agree: for drawing tokens, not for losses.

The processes have the same hidden states. Each multiplies its rows, and all get the logits of the whole vocabulary, [M, V], for
as many states as there are windows. What is drawn from them is what rank 0 of the head's group draws, whatever the generators
of the others are.
"""

import torch
from torch import Tensor

from topd.head import Head
from topd.models.output_layer import layer_product
from topd.ops.shared.collectives import gathered, of_first, outcomes


def together(head: Head, drawn: Tensor) -> Tensor:
    """Return what rank 0 of the head's group has drawn; of a whole head what this process has."""
    return drawn if head.shard is None else of_first(head.shard.group, drawn)


def widths_of(head: Head) -> list[int]:
    """Return how many tokens each rank of a split head's group holds."""
    assert head.shard is not None
    start, stop = head.bounds()
    return [width for (width,) in outcomes(head.shard.group, [stop - start], head.weight.device)]


@torch.no_grad()
def whole_product(head: Head, widths: list[int], hidden: Tensor, *, by_columns: bool = False) -> Tensor:
    """Return hidden weightᵀ + bias + adapter of all ranks' rows, [..., vocab], the same bits on every rank.

    Args:
        widths: of `widths_of`.
        by_columns: whether the result lies column by column in memory, [M, vocab].
    """
    assert head.shard is not None
    product = layer_product(hidden, head.weight, head.bias, head.adapter)
    start, stop = head.bounds()
    own = torch.nn.functional.pad(product[..., : stop - start], (0, max(widths) - (stop - start)))
    parts = gathered(head.shard.group, own)
    each = [part[..., :width] for part, width in zip(parts, widths, strict=True)]
    return torch.cat([part.t() for part in each]).t() if by_columns else torch.cat(each, dim=-1)
