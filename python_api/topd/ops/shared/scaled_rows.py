"""topd::scaled_rows, out[n] = scale[n] x[n] in out's dtype: gradients on their way out, and weighted hidden states.

A scale of 0 gives 0, whatever the row holds. The product is taken in the scale's dtype and rounded once to out's. On a GPU this
is one pass, which reads x and writes out; torch takes one for each of product, mask and cast, and several times as long where
the dtypes differ.
"""

import torch
from torch import Tensor

from topd.ops.shared.engines import Engine
from topd.ops.shared.op_body import define

define("topd::scaled_rows", "(Tensor(a!) out, Tensor x, Tensor scale) -> ()")


@torch.library.register_fake("topd::scaled_rows")
def _fake(out: Tensor, x: Tensor, scale: Tensor) -> None:
    return None


def along_width(rows: Tensor) -> Tensor:
    """Return rows whose entries lie side by side, as the kernels read them; a copy only where they do not."""
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def scaled_rows(engine: Engine, x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x [N, H], of any floating dtype, times scale [N], in `dtype`."""
    if engine.scales_rows:
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
        engine.kernel("scaled_rows", x.device)(out, along_width(x), scale)
        return out
    factors = scale.unsqueeze(-1)
    return (x * factors).masked_fill_(factors == 0, 0.0).to(dtype)
