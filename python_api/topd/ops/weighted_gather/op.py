"""topd::weighted_gather, out[n] += sum_m weights[n, m] table[ids[n, m]]: the ids' part of a gradient to hidden states.

Entries of weight 0 and ids outside the table add nothing, whatever the table holds. The sum is taken in out's dtype, in the
order of m. Read per row: M rows of the table.
"""

import torch
from torch import Tensor

from topd.ops.shared.engines import Engine, eager_kernel
from topd.ops.shared.op_body import define
from topd.ops.shared.scaled_rows import along_width

define("topd::weighted_gather", "(Tensor(a!) out, Tensor table, Tensor ids, Tensor weights) -> ()")

# Entries that the eager form gathers at a time.
PIECE = 4 << 20


@torch.library.register_fake("topd::weighted_gather")
def _fake(out: Tensor, table: Tensor, ids: Tensor, weights: Tensor) -> None:
    return None


def pieces(ids: Tensor, width: int) -> list[slice]:
    """Return slices of rows whose gathered entries fit in a piece."""
    step = max(1, PIECE // max(1, ids.shape[1] * width))
    return [slice(start, start + step) for start in range(0, ids.shape[0], step)]


def counted(ids: Tensor, weights: Tensor, vocab: int) -> Tensor:
    """Return which entries add something."""
    return (weights != 0) & (ids >= 0) & (ids < vocab)


def weighted_gather(engine: Engine, out: Tensor, table: Tensor, ids: Tensor, weights: Tensor) -> None:
    """Add to out [N, H] from table [V, H] of any floating dtype, ids and weights [N, M], weights in out's dtype."""
    engine.kernel("weighted_gather", out.device)(out, along_width(table), ids, weights)


@eager_kernel("weighted_gather")
def _eager(out: Tensor, table: Tensor, ids: Tensor, weights: Tensor) -> None:
    if not table.shape[0]:  # a rank of a sharded head may hold nothing
        return
    for piece in pieces(ids, table.shape[1]):
        counts = counted(ids[piece], weights[piece], table.shape[0])
        gathered = table[ids[piece].clamp(0, table.shape[0] - 1)].to(out.dtype).masked_fill_(~counts.unsqueeze(-1), 0.0)
        out[piece] += torch.bmm(weights[piece].masked_fill(~counts, 0.0).unsqueeze(1), gathered)[:, 0]
