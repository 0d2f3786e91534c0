"""topd::weighted_scatter, out[ids[n, m]] += weights[n, m] rows[n]: the ids' part of a gradient to a head.

Entries of weight 0 and ids outside out add nothing, whatever the row holds. The sum is taken in out's dtype, in one order
whatever the number of threads: by id where compiled; eager as index_add_ runs on a CPU and index_put_, which sorts, on a GPU
(the other one of each is not repeatable).
"""

import torch
from torch import Tensor

from topd.ops.shared.engines import Engine, eager_kernel
from topd.ops.shared.op_body import define
from topd.ops.shared.scaled_rows import along_width
from topd.ops.weighted_gather.op import counted, pieces

define("topd::weighted_scatter", "(Tensor(a!) out, Tensor rows, Tensor ids, Tensor weights) -> ()")


@torch.library.register_fake("topd::weighted_scatter")
def _fake(out: Tensor, rows: Tensor, ids: Tensor, weights: Tensor) -> None:
    return None


def weighted_scatter(engine: Engine, out: Tensor, rows: Tensor, ids: Tensor, weights: Tensor) -> None:
    """Add to out [V, H] from rows [N, H] of any floating dtype, ids and weights [N, M], weights in out's dtype."""
    engine.kernel("weighted_scatter", out.device)(out, along_width(rows), ids, weights)


@eager_kernel("weighted_scatter")
def _eager(out: Tensor, rows: Tensor, ids: Tensor, weights: Tensor) -> None:
    if not out.shape[0]:  # a rank of a sharded head may hold nothing
        return
    for piece in pieces(ids, rows.shape[1]):
        counts = counted(ids[piece], weights[piece], out.shape[0])
        added = weights[piece].unsqueeze(-1) * rows[piece].to(out.dtype).unsqueeze(1)
        added.masked_fill_(~counts.unsqueeze(-1), 0.0)
        to = ids[piece].clamp(0, out.shape[0] - 1)
        if out.device.type == "cpu":
            out.index_add_(0, to.flatten(), added.flatten(0, 1))
        else:
            out.index_put_((to,), added, accumulate=True)
