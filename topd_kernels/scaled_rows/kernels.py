"""The kernel of scaled_rows."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["scale_stride"], do_not_specialize_on_alignment=["Scale"])
def scale_row(Out, out_stride, X, x_stride, Scale, scale_stride, width, BLOCK: tl.constexpr):
    """Write a block of a row of X times the row's scale into Out; 0 where the scale is 0."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    scale = tl.load(Scale + row * scale_stride)
    x = tl.load(X + row * x_stride + columns, mask=mask, other=0.0).to(scale.dtype)
    scaled = tl.where(scale == 0, 0.0, x * scale)
    tl.store(Out + row * out_stride + columns, scaled.to(Out.dtype.element_ty), mask=mask)
