"""The kernel of weighted_gather."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["Ids", "Weights"])
def gather(Out, out_stride, Table, table_stride, Ids, Weights, count, vocab, width, BLOCK: tl.constexpr):
    """Add to a block of a row of Out the weighted rows of the table at its ids, in their order."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    Out += row * out_stride + columns
    dtype = Out.dtype.element_ty
    total = tl.load(Out, mask=mask, other=0.0)
    for m in range(count):
        token = tl.load(Ids + row * count + m)
        weight = tl.load(Weights + row * count + m)
        if (weight != 0) & (token >= 0) & (token < vocab):
            total += weight * tl.load(Table + token * table_stride + columns, mask=mask, other=0.0).to(dtype)
    tl.store(Out, total, mask=mask)
