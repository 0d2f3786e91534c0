"""topd::weighted_scatter for Triton: out[ids[n, m]] += weights[n, m] rows[n], without atomics, in one order.

The entries are sorted by id, stably. The program of an id's first entry adds up all of that id's, in their order; any other one
has nothing to do.
"""

import torch
from torch import Tensor

from topd_kernels.shared.blocks import device_of
from topd_kernels.shared.launch import Launch, bytes_of, cdiv, run_all
from topd_kernels.weighted_scatter.kernels import scatter


def launches(out: Tensor, rows: Tensor, ids: Tensor, weights: Tensor, *, family: str | None = None) -> list[Launch]:
    """Return the launch that adds to out [V, H]: rows [N, H], ids and weights [N, M]. `family`: of devices, where
    it is not the tensors' own."""
    entries, width = ids.numel(), out.shape[1]
    sizes = device_of(out.device, family).sizes("scatter", rows.itemsize)
    blocks = cdiv(width, sizes.block)
    by_id = torch.sort(ids.flatten(), stable=True)
    arguments = {
        "Out": out,
        "out_stride": out.stride(0),
        "Rows": rows,
        "rows_stride": rows.stride(0),
        "Sorted": by_id.values,
        "Order": by_id.indices,
        "Weights": weights.contiguous(),
        "entries": entries,
        "count": ids.shape[1],
        "vocab": out.shape[0],
        "width": width,
    }
    # An entry's id is read beside the one before it and once more as the one after.
    numbers = blocks * (3 * bytes_of(by_id.values) + bytes_of(by_id.indices, weights))
    return [
        Launch(
            scatter,
            (entries, blocks),
            arguments,
            {"BLOCK": sizes.block},
            sizes.num_warps,
            read_bytes=numbers + entries * width * (rows.itemsize + out.itemsize),
            written_bytes=entries * width * out.itemsize,
        )
    ]


def weighted_scatter(out: Tensor, rows: Tensor, ids: Tensor, weights: Tensor) -> None:
    """Run the op `topd::weighted_scatter`."""
    run_all(launches(out, rows, ids, weights))
