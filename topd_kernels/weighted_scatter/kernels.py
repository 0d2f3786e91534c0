"""The kernel of weighted_scatter."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["entries", "count"], do_not_specialize_on_alignment=["Weights"])
def scatter(
    Out, out_stride, Rows, rows_stride, Sorted, Order, Weights, entries, count, vocab, width, BLOCK: tl.constexpr
):  # fmt: skip
    """Add to a block of a row of Out all the weighted rows of its id, where this is the id's first entry."""
    entry = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    token = tl.load(Sorted + entry)
    before = tl.load(Sorted + tl.maximum(entry - 1, 0))
    if ((entry == 0) | (before != token)) & (token >= 0) & (token < vocab):
        To = Out + token * out_stride + columns
        total = tl.load(To, mask=mask, other=0.0)
        same = token
        while (same == token) & (entry < entries):
            source = tl.load(Order + entry)
            weight = tl.load(Weights + source)
            if weight != 0:
                Row = Rows + (source // count) * rows_stride + columns
                total += weight * tl.load(Row, mask=mask, other=0.0).to(total.dtype)
            entry += 1
            same = tl.load(Sorted + tl.minimum(entry, entries - 1))
        tl.store(To, total, mask=mask)
