"""Rows that the ranks of a sharded head share: sequence parallelism. Each rank has N rows of the whole sequence of R N.

All ranks compute all rows, each for its part of the vocabulary. So a chunk's hidden states are gathered before its products,
and the gradients to them go back to the ranks that have the rows. A chunk takes about the same share of every rank's chosen
rows: then all ranks send alike, and no rank has to hold the hidden states of all rows at a time.
"""

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from topd.ops.shared.collectives import Gathering
from topd.ops.shared.shard import Shard


class Piece(NamedTuple):
    """Some rows of the whole sequence. Each rank sends as many as the rank with the most of them, so that all send alike.

    Attributes:
        shard: the ranks.
        rank, slot: [C], which rank has each row, and as which of those that it sends.
        mine: [c], where the rows that this rank has stand among its N.
        most: the rows that each rank sends.
    """

    shard: Shard
    rank: Tensor
    slot: Tensor
    mine: Tensor
    most: int

    def gathering(self, hidden: Tensor) -> "_States":
        """Begin to gather the rows of hidden states, of which each rank has a part, [N, H] here."""
        sent = hidden.new_zeros(self.most, hidden.shape[1])
        sent[: self.mine.numel()] = hidden[self.mine]
        return _States(self, self.shard.gathering(sent))

    def by_rank(self, part: Tensor) -> Tensor:
        """Return rows [C, H] where the ranks that have them find theirs, [R, most, H]; zeros elsewhere."""
        out = part.new_zeros(self.shard.ranks, self.most, part.shape[1])
        out[self.rank, self.slot] = part
        return out


class _States(NamedTuple):
    """The hidden states of a piece, on their way."""

    piece: Piece
    everyone: Gathering

    def arrived(self) -> Tensor:
        """Wait, and return them [C, H]."""
        return self.everyone.arrived()[self.piece.rank, self.piece.slot]


class SplitRows:
    """The chosen rows of the whole sequence, in the order in which chunks take them.

    Args:
        shard: the ranks, which share the rows.
        chosen: [T], where the chosen rows stand among the R N, ascending; the same on every rank.
        n: rows of a rank.

    Attributes:
        rows: [T], the same rows in the order of the chunks, on the device of `chosen`.
    """

    def __init__(self, shard: Shard, chosen: Tensor, n: int) -> None:
        rows = chosen.cpu()
        rank = rows // max(n, 1)
        counts = torch.bincount(rank, minlength=shard.ranks)
        first = counts.cumsum(0) - counts
        place = torch.arange(rows.numel(), device="cpu") - first[rank]  # among the chosen rows of its rank
        order = ((place + 0.5) / counts[rank]).argsort(stable=True)
        self._shard, self._n, self._device = shard, n, chosen.device
        self._rows, self._rank, self._place = rows[order], rank[order], place[order]
        self.rows = self._rows.to(self._device)

    def states(self, hidden: list[Tensor], bounds: list[tuple[int, int]]) -> Iterator[list[Tensor]]:
        """Yield for each (start, stop) the rows of each of these hidden states [N, H_i]; those of the next are on their way
        meanwhile, before a sum that the chunk begins: where collectives wait for each other, as NCCL's, the products of the
        next chunk need not wait for that sum."""
        pieces = (self.piece(start, stop) for start, stop in bounds)
        coming = [[part.gathering(each) for each in hidden] for part in islice(pieces, 1)]
        while coming:
            now = [each.arrived() for each in coming.pop()]
            coming = [[part.gathering(each) for each in hidden] for part in islice(pieces, 1)]
            yield now

    def piece(self, start: int, stop: int) -> Piece:
        """Return those from start to stop in the order of the chunks."""
        rows, rank, place = (each[start:stop] for each in (self._rows, self._rank, self._place))
        first = rank.new_zeros(self._shard.ranks).scatter_reduce(0, rank, place, "amin", include_self=False)
        own = self._shard.own(self._n)
        mine = rows[(rows >= own.start) & (rows < own.stop)] - own.start
        most = int(torch.bincount(rank).max())
        rank, slot, mine = (each.to(self._device) for each in (rank, place - first[rank], mine))
        return Piece(self._shard, rank, slot, mine, most)
