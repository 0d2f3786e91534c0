"""Which part of the vocabulary a process holds, and how parts become the whole: without collectives of its own, which are in
`topd.ops.shared.collectives`.

A row's softmax is known from (top, rest): the largest logit, and the sum of exp(y - top) beside it. Ranks exchange theirs and
combine them in the order of the ranks, in double:

    top = max top_r        m_r = (1 + rest_r) exp(top_r - top)        rest = rest_owner + sum of m_r over the others

where the owner is the first rank that has the top. Its own 1 never enters `rest`, which keeps the digits of a peaked row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from topd.ops.shared.collectives import Gathering, added_up, gathered, gathering, group_of, outcomes

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Shard:
    """The part of the vocabulary that this process holds. It travels through an op's schema as its name.

    Attributes:
        group: the processes that hold the vocabulary together; None: this one holds it all.
        start: the first token that is held here.
        sequence: each process has rows of its own, N on all of them; the whole sequence is R N rows in the order of the ranks.
    """

    group: "ProcessGroup | None" = None
    start: int = 0
    sequence: bool = False

    @property
    def name(self) -> str:
        """The text from which `shard_of` makes the same."""
        sequence = SEQUENCE if self.sequence else ""
        return "" if self.group is None else f"{self.start}{sequence} {self.group.group_name}"

    def gathered(self, mine: Tensor) -> Tensor:
        """Return [R, ...], what each rank has; R = 1 where one process holds the whole vocabulary."""
        return mine.unsqueeze(0) if self.group is None else gathered(self.group, mine)

    def gathering(self, mine: Tensor) -> Gathering:
        """Begin to gather what each rank has, where other processes hold further parts."""
        assert self.group is not None
        return gathering(self.group, mine)

    @property
    def ranks(self) -> int:
        """The number of processes that hold the vocabulary."""
        return 1 if self.group is None else self.group.size()

    @property
    def split(self) -> bool:
        """Whether other processes hold further parts."""
        return self.group is not None

    def local(self, tokens: Tensor) -> Tensor:
        """Return the tokens' columns here; those that other ranks hold lie outside [0, V)."""
        return tokens - self.start if self.start else tokens

    def summed(self, mine: Tensor) -> Tensor:
        """Return the sum over the ranks of partial gradients, maybe in `mine`."""
        return mine if self.group is None or not mine.numel() else added_up(self.group, mine)

    def own(self, n: int) -> slice:
        """Return where this process's n rows stand among those of all."""
        first = n * self.group.rank() if self.group is not None and self.sequence else 0
        return slice(first, first + n)

    def of_all(self, *columns: Tensor) -> list[Tensor]:
        """Return each column [N, ...] as that of the whole sequence [R N, ...]: one collective for all of them, or none."""
        if self.group is None or not self.sequence:
            return list(columns)
        shapes = [(column.shape[0] * self.ranks, *column.shape[1:]) for column in columns]
        if not any(column.numel() for column in columns):
            return [column.new_empty(shape) for column, shape in zip(columns, shapes, strict=True)]
        sent = [column.contiguous().flatten().view(torch.uint8) for column in columns]
        everyone = gathered(self.group, torch.cat(sent)).split([part.numel() for part in sent], dim=1)
        parts = (part.clone(memory_format=torch.contiguous_format).flatten() for part in everyone)  # aligned for its dtype
        typed = (part.view(column.dtype) for part, column in zip(parts, columns, strict=True))
        return [part.reshape(shape) for part, shape in zip(typed, shapes, strict=True)]

    def union(self, *masks: Tensor) -> list[Tensor]:
        """Return each mask [N], or-ed over the ranks; one collective for all of them."""
        if self.group is None:
            return list(masks)
        return list(gathered(self.group, torch.stack(masks).to(torch.uint8)).amax(0).bool().unbind(0))

    def agreed(self, n: int, vocabs: Sequence[int], workspace_bytes: int, device: torch.device) -> tuple[list[int], int]:
        """Return what all ranks plan with: for each tile the widest one, and the smallest workspace.

        Raises:
            ValueError: the ranks compute different numbers of rows; on all of them.
        """
        if self.group is None:
            return list(vocabs), workspace_bytes
        each = outcomes(self.group, [n, workspace_bytes, *vocabs], device)
        rows, budgets, *widths = zip(*each, strict=True)
        if len(set(rows)) > 1:
            raise ValueError(
                "a sharded head takes the same unmasked rows on every rank of its group, got "
                f"{', '.join(map(str, rows))} of them; give all ranks the same hidden states and mask"
            )
        return [max(width) for width in widths], min(budgets)


WHOLE = Shard()
SEQUENCE = "+sequence"


def shard_of(name: str) -> Shard:
    """Return the shard of a name."""
    if not name:
        return WHOLE
    start, _, group = name.partition(" ")
    return Shard(group_of(group), int(start.removesuffix(SEQUENCE)), start.endswith(SEQUENCE))


def in_rank_order(parts: Tensor) -> Tensor:
    """Return the sum over the first dimension, added in its order."""
    return reduce(torch.add, parts.unbind(0))


class Combined(NamedTuple):
    """A softmax over all ranks' parts: top and rest, the rank that owns the top, and each rank's share of the probability
    [R, ...], in double but for `top` and `owner`."""

    top: Tensor
    rest: Tensor
    owner: Tensor
    shares: Tensor


def combined(tops: Tensor, rests: Tensor) -> Combined:
    """Return the softmax of parts [R, ...]. A part of no entries, or of nothing but -inf, has the top -inf."""
    owner = tops.argmax(0, keepdim=True)
    top = tops.gather(0, owner)
    rests, absent = rests.double(), tops.isneginf()
    masses = ((1 + rests) * (tops.double() - top.double()).exp()).masked_fill(absent, 0.0)
    rest = in_rank_order(masses.scatter(0, owner, rests.gather(0, owner)))
    return Combined(top[0], rest, owner[0], masses / (1 + rest))
