"""topd::weighted_scatter for Triton: out[ids[n, m]] += weights[n, m] rows[n], without atomics, in one order.

The entries are sorted by id, stably, and cut into segments of 32, wherever ids begin. A program adds up an id's entries in one
segment, in their order: no program takes more than 32 steps, however often an id comes. What an id has in further segments is
added up after that, 32 segments a step.
"""

import torch
from torch import Tensor

from topd_kernels.shared.blocks import device_of
from topd_kernels.shared.launch import Launch, bytes_of, cdiv, run_all
from topd_kernels.weighted_scatter.kernels import add_segments, scatter

SEGMENT = 32
# Of `add_segments`: what its programs hold is a block of segments by columns.
SEGMENTS, SEGMENTS_WIDTH, SEGMENTS_WARPS = 32, 128, 4


def launches(out: Tensor, rows: Tensor, ids: Tensor, weights: Tensor, *, family: str | None = None) -> list[Launch]:
    """Return the launches that add to out [V, H]: rows [N, H], ids and weights [N, M]. `family`: of devices, where
    it is not the tensors' own."""
    entries, width = ids.numel(), out.shape[1]
    sizes = device_of(out.device, family).sizes("scatter", rows.itemsize)
    blocks, segments = cdiv(width, sizes.block), cdiv(entries, SEGMENT)
    by_id = torch.sort(ids.flatten(), stable=True)
    shared = {
        "Out": out,
        "out_stride": out.stride(0),
        "Sorted": by_id.values,
        "Scratch": out.new_empty(segments, width),
        "entries": entries,
        "vocab": out.shape[0],
        "width": width,
    }
    of_rows = {
        "Rows": rows,
        "rows_stride": rows.stride(0),
        "Order": by_id.indices,
        "Weights": weights.contiguous(),
        "count": ids.shape[1],
    }
    # An entry's id is read beside the one before it and once more as the one after.
    numbers = blocks * (3 * bytes_of(by_id.values) + bytes_of(by_id.indices, weights))
    further, narrow_blocks = max(0, segments - 1), cdiv(width, SEGMENTS_WIDTH)
    return [
        Launch(
            scatter,
            (entries, blocks),
            shared | of_rows,
            {"SEGMENT": SEGMENT, "BLOCK": sizes.block},
            sizes.num_warps,
            read_bytes=numbers + entries * width * (rows.itemsize + out.itemsize),
            written_bytes=entries * width * out.itemsize,
        ),
        Launch(
            add_segments,
            (further, narrow_blocks),
            shared,
            {"SEGMENT": SEGMENT, "SEGMENTS": SEGMENTS, "BLOCK": SEGMENTS_WIDTH},
            SEGMENTS_WARPS,
            read_bytes=3 * further * narrow_blocks * by_id.values.itemsize,
        ),
    ]


def weighted_scatter(out: Tensor, rows: Tensor, ids: Tensor, weights: Tensor) -> None:
    """Run the op `topd::weighted_scatter`."""
    run_all(launches(out, rows, ids, weights))
