"""topd::weighted_gather for Triton: out[n] += sum_m weights[n, m] table[ids[n, m]], in the order of m."""

from torch import Tensor

from topd_kernels.shared.blocks import device_of
from topd_kernels.shared.launch import Launch, bytes_of, cdiv, run_all
from topd_kernels.weighted_gather.kernels import gather


def launches(out: Tensor, table: Tensor, ids: Tensor, weights: Tensor, *, family: str | None = None) -> list[Launch]:
    """Return the launch that adds to out [N, H]: table [V, H], ids and weights [N, M]. `family`: of devices, where
    it is not the tensors' own."""
    (rows, count), width = ids.shape, out.shape[1]
    sizes = device_of(out.device, family).sizes("gather", table.itemsize)
    blocks = cdiv(width, sizes.block)
    arguments = {
        "Out": out,
        "out_stride": out.stride(0),
        "Table": table,
        "table_stride": table.stride(0),
        "Ids": ids.contiguous(),
        "Weights": weights.contiguous(),
        "count": count,
        "vocab": table.shape[0],
        "width": width,
    }
    read = bytes_of(out) + blocks * bytes_of(ids, weights) + rows * count * width * table.itemsize
    return [
        Launch(
            gather,
            (rows, blocks),
            arguments,
            {"BLOCK": sizes.block},
            sizes.num_warps,
            read_bytes=read,
            written_bytes=bytes_of(out),
        )
    ]


def weighted_gather(out: Tensor, table: Tensor, ids: Tensor, weights: Tensor) -> None:
    """Run the op `topd::weighted_gather`."""
    run_all(launches(out, table, ids, weights))
