"""Who sees whom: tokens of a rollout and of the windows that branch off it, as nodes of a tree.

A node of the trunk sees the trunk up to its own column; a node of a window sees the trunk before the window and its own window
up to itself; a sliding layer sees only keys nearer than its window, counted in positions.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

TRUNK = -1


def number_within(row: Tensor) -> Tensor:
    """Return [m] int64: how many earlier entries have the same row."""
    order = row.argsort(stable=True)
    counts = row.bincount()
    number = torch.empty_like(row)
    number[order] = torch.arange(row.numel(), device=row.device) - (counts.cumsum(0) - counts)[row[order]]
    return number


@dataclass(frozen=True, eq=False)
class Nodes:
    """Tokens [B, S]; every tensor is of that shape.

    Attributes:
        window: int64, the window's number within its row, or TRUNK.
        order: int64, the column in the trunk, or the place in the window.
        limit: int64, the last column of the trunk that it sees.
        position: int64, its position_id.
        valid: bool; what is not valid is seen by nobody.
    """

    window: Tensor
    order: Tensor
    limit: Tensor
    position: Tensor
    valid: Tensor

    @classmethod
    def trunk(cls, attended: Tensor, position_ids: Tensor) -> "Nodes":
        """Return the nodes of rollouts [B, T]."""
        columns = torch.arange(attended.shape[1], device=attended.device).expand_as(position_ids)
        return cls(torch.full_like(columns, TRUNK), columns, columns, position_ids, attended)

    def pick(self, rows: Tensor) -> "Nodes":
        """Return the nodes of these rows, in this order."""
        return Nodes(*(getattr(self, field.name)[rows] for field in fields(self)))

    def columns(self, start: int, stop: int) -> "Nodes":
        """Return the nodes in these columns."""
        return Nodes(*(getattr(self, field.name)[:, start:stop] for field in fields(self)))

    def join(self, other: "Nodes") -> "Nodes":
        """Return both, one after the other in each row."""
        return Nodes(*(torch.cat([getattr(self, f.name), getattr(other, f.name)], dim=1) for f in fields(self)))


def visible(queries: Nodes, keys: Nodes, sliding: int | None = None) -> Tensor:
    """Return [B, S_q, S_k] bool: which keys each query sees."""
    window, order, limit, position = (getattr(queries, name).unsqueeze(-1) for name in ("window", "order", "limit", "position"))
    key_window, key_order = keys.window.unsqueeze(1), keys.order.unsqueeze(1)
    seen = torch.where(key_window == TRUNK, key_order <= limit, (key_window == window) & (key_order <= order))
    seen = seen & keys.valid.unsqueeze(1)
    return seen if sliding is None else seen & (position - keys.position.unsqueeze(1) < sliding)


def attention_masks(
    queries: Nodes, keys: Nodes, sliding: dict[str, int | None], dtype: torch.dtype
) -> Tensor | dict[str, Tensor]:
    """Return additive masks [B, 1, S_q, S_k]: one tensor for layers of one kind, else one for each kind by its name.

    A query of padding, which may attend to nothing, attends to all keys: a softmax over nothing would be NaN where autocast
    turns the lowest number into -inf.
    """
    hidden = torch.finfo(dtype).min
    masks = {}
    for kind, window in sliding.items():
        seen = visible(queries, keys, window)
        seen |= ~seen.any(-1, keepdim=True)
        masks[kind] = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, hidden).unsqueeze(1)
    return masks if len(masks) > 1 else next(iter(masks.values()))
