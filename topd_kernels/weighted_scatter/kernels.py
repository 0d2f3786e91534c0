"""The kernels of weighted_scatter."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["entries", "count"], do_not_specialize_on_alignment=["Weights"])
def scatter(
    Out, out_stride, Rows, rows_stride, Sorted, Order, Weights, Scratch, entries, count, vocab, width,
    SEGMENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum a block of the weighted rows of an id's entries in one segment. The program of an id's first entry adds them to the
    id's row of Out; that of a segment's first entry, where the id began before, leaves them in Scratch for `add_segments`."""
    entry = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    token = tl.load(Sorted + entry)
    before = tl.load(Sorted + tl.maximum(entry - 1, 0))
    first = (entry == 0) | (before != token)
    if (first | (entry % SEGMENT == 0)) & (token >= 0) & (token < vocab):
        To = Out + token * out_stride + columns
        Left = Scratch + entry // SEGMENT * width + columns
        total = tl.zeros([BLOCK], dtype=Out.dtype.element_ty)
        if first:
            total = tl.load(To, mask=mask, other=0.0)
        end = tl.minimum((entry // SEGMENT + 1) * SEGMENT, entries)
        same = token
        while (same == token) & (entry < end):
            source = tl.load(Order + entry)
            weight = tl.load(Weights + source)
            if weight != 0:
                Row = Rows + (source // count) * rows_stride + columns
                total += weight * tl.load(Row, mask=mask, other=0.0).to(total.dtype)
            entry += 1
            same = tl.load(Sorted + tl.minimum(entry, entries - 1))
        if first:
            tl.store(To, total, mask=mask)
        else:
            tl.store(Left, total, mask=mask)


@triton.jit(do_not_specialize=["entries"])
def add_segments(
    Out, out_stride, Sorted, Scratch, entries, vocab, width,
    SEGMENT: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add to a block of a row of Out what its id's entries have in further segments, SEGMENTS of them at a time. It is done by
    the program of the first of these segments."""
    segment = tl.program_id(0).to(tl.int64) + 1
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    token = tl.load(Sorted + segment * SEGMENT)
    before = tl.load(Sorted + segment * SEGMENT - 1)
    earlier = tl.load(Sorted + tl.maximum((segment - 1) * SEGMENT - 1, 0))
    begins = (segment == 1) | (earlier != token)
    if (token == before) & begins & (token >= 0) & (token < vocab):
        To = Out + token * out_stride + columns
        total = tl.load(To, mask=mask, other=0.0)
        count = (entries + SEGMENT - 1) // SEGMENT
        goes_on = token == before
        while goes_on:
            each = segment + tl.arange(0, SEGMENTS)
            there = tl.load(Sorted + each * SEGMENT, mask=each < count, other=-1) == token
            Parts = Scratch + each[:, None] * width + columns[None, :]
            total += tl.sum(tl.load(Parts, mask=there[:, None] & mask[None, :], other=0.0), 0)
            segment += SEGMENTS
            last = tl.load(Sorted + tl.minimum(segment * SEGMENT, entries - 1))
            goes_on = (segment < count) & (last == token)
        tl.store(To, total, mask=mask)
