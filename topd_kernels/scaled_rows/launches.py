"""topd::scaled_rows for Triton: out[n] = scale[n] x[n], 0 where the scale is 0."""

from torch import Tensor

from topd_kernels.scaled_rows.kernels import scale_row
from topd_kernels.shared.blocks import SCALED
from topd_kernels.shared.launch import Launch, bytes_of, cdiv, run_all


def launches(out: Tensor, x: Tensor, scale: Tensor) -> list[Launch]:
    """Return the launch that fills out [N, H] from x [N, H] and scale [N], which may be an expanded number."""
    rows, width = x.shape
    blocks = cdiv(width, SCALED.block)
    arguments = {
        "Out": out,
        "out_stride": out.stride(0),
        "X": x,
        "x_stride": x.stride(0),
        "Scale": scale,
        "scale_stride": scale.stride(0),
        "width": width,
    }
    read = bytes_of(x) + blocks * bytes_of(scale)
    constants = {"BLOCK": SCALED.block}
    return [
        Launch(scale_row, (rows, blocks), arguments, constants, SCALED.num_warps, read_bytes=read, written_bytes=bytes_of(out))
    ]


def scaled_rows(out: Tensor, x: Tensor, scale: Tensor) -> None:
    """Run the op `topd::scaled_rows`."""
    run_all(launches(out, x, scale))
