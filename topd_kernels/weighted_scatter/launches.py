"""topd::weighted_scatter for Triton: out[ids[n, m]] += weights[n, m] rows[n], without atomics, in one order.

The entries are sorted by id, stably. The program of an id's first entry adds up all of that id's, in their order; any other one
has nothing to do. Read per entry: its row; out once an id. Written: out once an id.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from topd_kernels.shared.launch import Launch

WIDTH, NUM_WARPS = 512, 4


@triton.jit(do_not_specialize=["entries", "count"], do_not_specialize_on_alignment=["Weights"])
def _scatter(
    Out, out_stride, Rows, rows_stride, Sorted, Order, Weights, entries, count, vocab, width, BLOCK: tl.constexpr
):  # fmt: skip
    entry = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < width
    token = tl.load(Sorted + entry)
    before = tl.load(Sorted + tl.maximum(entry - 1, 0))
    if ((entry == 0) | (before != token)) & (token >= 0) & (token < vocab):
        To = Out + token * out_stride + at
        total = tl.load(To, mask=mask, other=0.0)
        same = token
        while (same == token) & (entry < entries):
            source = tl.load(Order + entry)
            weight = tl.load(Weights + source)
            if weight != 0:
                total += weight * tl.load(Rows + (source // count) * rows_stride + at, mask=mask, other=0.0).to(total.dtype)
            entry += 1
            same = tl.load(Sorted + tl.minimum(entry, entries - 1))
        tl.store(To, total, mask=mask)


def launches(out: Tensor, rows: Tensor, ids: Tensor, weights: Tensor) -> list[Launch]:
    ordered = torch.sort(ids.flatten(), stable=True)
    arguments = {
        "Out": out,
        "out_stride": out.stride(0),
        "Rows": rows,
        "rows_stride": rows.stride(0),
        "Sorted": ordered.values,
        "Order": ordered.indices,
        "Weights": weights.contiguous(),
        "entries": ids.numel(),
        "count": ids.shape[1],
        "vocab": out.shape[0],
        "width": out.shape[1],
    }
    grid = (ids.numel(), triton.cdiv(out.shape[1], WIDTH))
    return [Launch(_scatter, grid, arguments, {"BLOCK": WIDTH}, NUM_WARPS)]


def weighted_scatter(out: Tensor, rows: Tensor, ids: Tensor, weights: Tensor) -> None:
    """The op `topd::weighted_scatter`."""
    for launch in launches(out, rows, ids, weights):
        launch.run()
