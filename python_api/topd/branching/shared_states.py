"""Keys or values of one layer that many branches share, and attention over them.

Branch b of rollout r attends to the rollout's columns, which all branches of r share, and to its own few tokens. As one tensor
that would be [branches, heads, T + steps, d], T columns copied for every branch. `SharedStates` stands for it: torch's own
protocol (`__torch_function__`) hands `scaled_dot_product_attention` to `shared_attention`, which multiplies all branches of
a rollout with its columns at once and each with its own tokens. Whatever else is asked of it gets the tensor itself.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from topd.branching.nodes import number_within


@dataclass(frozen=True, eq=False)
class Places:
    """Where M branches, sorted by rollout, stand in a table [B, n] with n the most branches of one rollout.

    Attributes:
        row: [M] int64, the rollout of each branch.
        slot: [M] int64, row * n + the number within the rollout; None: the branches fill the table.
    """

    row: Tensor
    slot: Tensor | None
    rows: int
    most: int

    @classmethod
    def of(cls, row: Tensor, rows: int) -> "Places":
        """Return the places of branches whose rollouts `row` [M] names in rising order, of `rows` rollouts."""
        counts = row.bincount(minlength=rows)
        most = int(counts.max())
        if rows * most == row.numel():
            return cls(row, None, rows, most)
        return cls(row, row * most + number_within(row), rows, most)

    def spread(self, value: Tensor) -> Tensor:
        """Turn [M, heads, r, x] into [B, heads, n r, x], 0 where there is no branch."""
        if self.slot is not None:
            value = value.new_zeros(self.rows * self.most, *value.shape[1:]).index_copy_(0, self.slot, value)
        _, heads, r, x = value.shape
        return value.view(self.rows, self.most, heads, r, x).transpose(1, 2).reshape(self.rows, heads, self.most * r, x)

    def collect(self, value: Tensor, r: int) -> Tensor:
        """Turn [B, heads, n r, x] into [M, heads, r, x]: what `spread` spread out."""
        _, heads, _, x = value.shape
        value = value.view(self.rows, heads, self.most, r, x).transpose(1, 2).reshape(self.rows * self.most, heads, r, x)
        return value if self.slot is None else value[self.slot]


class SharedStates:
    """Stand for keys or values [M, heads, T + steps, d] that are never formed.

    Args:
        common: [B, heads, T, d], shared by the branches of a rollout.
        own: [M, heads, steps, d].
        places: which rollout each branch belongs to.
    """

    def __init__(self, common: Tensor, own: Tensor, places: Places) -> None:
        self.common, self.own, self.places = common, own, places
        self.shape = torch.Size((*own.shape[:2], common.shape[2] + own.shape[2], own.shape[3]))

    @cached_property
    def whole(self) -> Tensor:
        """The tensor itself."""
        return torch.cat([self.common[self.places.row], self.own], dim=2)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole, name)

    def __getitem__(self, index: Any) -> Tensor:
        return self.whole[index]

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        if function is torch.nn.functional.scaled_dot_product_attention and len(args) == 3:
            plain = not options.get("dropout_p") and not options.get("is_causal")
            mask = options.get("attn_mask")
            if plain and isinstance(args[1], cls) and isinstance(args[2], cls) and isinstance(mask, Tensor):
                return shared_attention(args[0], args[1], args[2], mask, options.get("scale"))
        options = {name: _whole(value) for name, value in options.items()}
        return function(*map(_whole, args), **options)


def _whole(value: Any) -> Any:
    """Replace each SharedStates in an argument by the tensor that it stands for."""
    if isinstance(value, list | tuple):
        return type(value)(map(_whole, value))
    return value.whole if isinstance(value, SharedStates) else value


def shared_attention(query: Tensor, keys: SharedStates, values: SharedStates, mask: Tensor, scale: float | None) -> Tensor:
    """Return softmax(scale query keysᵀ + mask) values, without forming keys or values.

    Args:
        query: [M, h, q, d], where h q is a multiple of the keys' heads, consecutive query heads on one of them.
        mask: [M, 1, 1, T + steps], additive.

    Returns:
        [M, h, q, d_v] in the query's dtype; the softmax is float32 at least.
    """
    places, columns = keys.places, keys.common.shape[2]
    m, heads, width = query.shape[0], keys.shape[1], query.shape[-1]
    scaled = query.reshape(m, heads, -1, width) * (width**-0.5 if scale is None else scale)
    r = scaled.shape[2]
    common = places.collect(places.spread(scaled) @ keys.common.mT, r)
    scores = torch.cat([common, scaled @ keys.own.mT], dim=-1)
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = (scores.to(wide) + mask).softmax(-1).to(query.dtype)
    output = places.collect(places.spread(weights[..., :columns]) @ values.common, r)
    output += weights[..., columns:] @ values.own
    return output.reshape(*query.shape[:-1], output.shape[-1])
