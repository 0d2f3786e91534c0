"""The gradients to hidden states: each rank of a sharded head has the part that its tokens make, and what is wanted is the sum.

A pile's sum is on its way while the next pile is computed; one at a time.
"""

from typing import NamedTuple

from torch import Tensor

from topd.ops.shared.collectives import Sending, adding_up, adding_up_parts
from topd.ops.shared.shard import Shard
from topd.ops.shared.split_rows import Piece


class _Pending(NamedTuple):
    """A sum on its way: it will be in `rows`, whose place in u is `row_index`; `sent` must live until then."""

    sending: Sending
    rows: Tensor
    row_index: slice | Tensor
    sent: Tensor


class HiddenSums:
    """Sums u [N, H] over the ranks, a pile at a time; call `finish` before u is read.

    Args:
        shard: the ranks; of one process nothing is summed.
        u: written to: the gradients to the hidden states that this rank has.
    """

    def __init__(self, shard: Shard, u: Tensor) -> None:
        self.shard, self.u = shard, u
        self._pending: _Pending | None = None

    def place(self, row_index: slice | Tensor, piece: Piece | None) -> Tensor | None:
        """Return the rows of u in which a pile's part may be made; None where it needs a tensor of its own."""
        return self.u[row_index] if piece is None and isinstance(row_index, slice) else None

    def add(self, part: Tensor, row_index: slice | Tensor, piece: Piece | None) -> None:
        """Take a pile's part [P, H], which is in its `place` where there is one, and begin to sum it."""
        self.finish()
        group = self.shard.group
        if group is None:
            self._put(part, row_index)
        elif piece is None:
            self._pending = _Pending(adding_up(group, part), part, row_index, part)
        else:
            sent, received = piece.by_rank(part), part.new_empty(piece.most, part.shape[1])
            sending = adding_up_parts(group, sent, received)
            self._pending = _Pending(sending, received[: piece.mine.numel()], piece.mine, sent)

    def take(self, part: Tensor, row_index: slice | Tensor) -> None:
        """Take a part that was made elsewhere, of rows that all ranks have."""
        out = self.place(row_index, None)
        self.add(part if out is None else out.copy_(part), row_index, None)

    def finish(self) -> None:
        """Wait for the last sum."""
        if self._pending is not None:
            self._pending.sending.wait()
            self._put(self._pending.rows, self._pending.row_index)
            self._pending = None

    def _put(self, rows: Tensor, row_index: slice | Tensor) -> None:
        if isinstance(row_index, Tensor):  # else they are there
            self.u[row_index] = rows
