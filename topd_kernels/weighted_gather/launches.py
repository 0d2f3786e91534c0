"""topd::weighted_gather for Triton: out[n] += sum_m weights[n, m] table[ids[n, m]], in the order of m.

Read per row: M rows of the table, M ids and weights; out once. Written: out.
"""

import triton
import triton.language as tl
from torch import Tensor

from topd_kernels.shared.launch import Launch

WIDTH, NUM_WARPS = 512, 4


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["Ids", "Weights"])
def _gather(Out, out_stride, Table, table_stride, Ids, Weights, count, vocab, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < width
    Out += row * out_stride + at
    dtype = Out.dtype.element_ty
    total = tl.load(Out, mask=mask, other=0.0)
    for m in range(count):
        token = tl.load(Ids + row * count + m)
        weight = tl.load(Weights + row * count + m)
        if (weight != 0) & (token >= 0) & (token < vocab):
            total += weight * tl.load(Table + token * table_stride + at, mask=mask, other=0.0).to(dtype)
    tl.store(Out, total, mask=mask)


def launches(out: Tensor, table: Tensor, ids: Tensor, weights: Tensor) -> list[Launch]:
    arguments = {
        "Out": out,
        "out_stride": out.stride(0),
        "Table": table,
        "table_stride": table.stride(0),
        "Ids": ids.contiguous(),
        "Weights": weights.contiguous(),
        "count": ids.shape[1],
        "vocab": table.shape[0],
        "width": out.shape[1],
    }
    grid = (ids.shape[0], triton.cdiv(out.shape[1], WIDTH))
    return [Launch(_gather, grid, arguments, {"BLOCK": WIDTH}, NUM_WARPS)]


def weighted_gather(out: Tensor, table: Tensor, ids: Tensor, weights: Tensor) -> None:
    """The op `topd::weighted_gather`."""
    for launch in launches(out, table, ids, weights):
        launch.run()
