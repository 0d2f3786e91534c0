"""The kernels of logprob_rows: ids taken out of a row, what is left of it summed, and both gradients.

Formulas are those of python_api/topd/ops/linear_logprobs/eager.py.
"""

import triton
import triton.language as tl

from topd_kernels.logprob_rows.records import (
    PART_GAPS,
    PART_REST,
    PART_TOP,
    ROW_FINITE,
    ROW_LOG_REST,
    ROW_MEAN_GAP,
    ROW_REST_SHARE,
    ROW_REST_TOP,
    ROW_TOP,
)
from topd_kernels.shared.logits import LEFT_OUT, logits_of, slope_of, unmasked_logits
from topd_kernels.shared.records import load_field, store_field
from topd_kernels.shared.row_math import FAR, FLOOR, exp, log1p, number
from topd_kernels.shared.tops import LANE_ENTRIES, lead, merge


@triton.jit(do_not_specialize=["biased", "count"], do_not_specialize_on_alignment=["Ids"])
def chosen(
    Product, stride, Bias, biased, Ids, Chosen, First, Slope, count, vocab, inner: tl.float64, outer: tl.float64,
    GENERAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gather a row's logits at its ids, and tell which ids are the first of their value."""
    row = tl.program_id(0).to(tl.int64)
    Product += row * stride
    Ids += row * count
    dtype = Product.dtype.element_ty
    cap = number(outer, dtype)
    steep = number(inner, dtype) * tl.where(cap > 0, cap, 1.0)
    for block in range(0, count, BLOCK):
        m = block + tl.arange(0, BLOCK)
        mask = m < count
        ids = tl.load(Ids + m, mask=mask, other=-1)
        inside = (ids >= 0) & (ids < vocab)
        y = tl.load(Product + ids, mask=inside, other=0.0)
        y = logits_of(y, Bias, ids, inside, biased != 0, number(inner, dtype), cap, cap > 0, GENERAL)
        first = inside
        for earlier in range(tl.minimum(block + BLOCK, count)):
            first = first & ((ids != tl.load(Ids + earlier)) | (m <= earlier))
        tl.store(Chosen + row * count + m, y, mask=mask)
        tl.store(First + row * count + m, first, mask=mask)
        if GENERAL:
            slope = slope_of(y, steep, 1 / tl.where(cap > 0, cap, 1.0), cap > 0, GENERAL)
            tl.store(Slope + row * count + m, slope, mask=mask)


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["Ids"])
def leave_out(Product, stride, Ids, count, vocab, BLOCK: tl.constexpr):
    """Take the ids' entries out of a row of the tile."""
    row = tl.program_id(0).to(tl.int64)
    for block in range(0, count, BLOCK):
        m = block + tl.arange(0, BLOCK)
        ids = tl.load(Ids + row * count + m, mask=m < count, other=-1)
        left = tl.full([BLOCK], LEFT_OUT, Product.dtype.element_ty)
        tl.store(Product + row * stride + ids, left, mask=(ids >= 0) & (ids < vocab))


@triton.jit
def _kept(product, Bias, entries, biased, inner, outer, GENERAL: tl.constexpr):
    """Return the logits of whole blocks; -inf for an entry that was left out."""
    return tl.where(product != LEFT_OUT, unmasked_logits(product, Bias, entries, biased, inner, outer, GENERAL), float("-inf"))


@triton.jit(do_not_specialize=["biased", "rows", "block_count"])
def rest(
    Product, stride, Bias, biased, Parts, rows, block_count, vocab, inner: tl.float64, outer: tl.float64,
    ENTROPY: tl.constexpr, GENERAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Read a part of a row once; write its record of Parts. The largest entry so far is a number, not one for each lane; it is
    looked for again only in a block that rises above it, and in the last one, which has a mask."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    Product += row * stride
    dtype = Product.dtype.element_ty
    LANES: tl.constexpr = BLOCK // LANE_ENTRIES
    offset = tl.arange(0, LANE_ENTRIES)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    cap = number(outer, dtype)
    steep = number(inner, dtype)
    top = tl.full([], float("-inf"), dtype)
    rest = tl.zeros([LANES], dtype)
    w = rest
    block = split * block_count * BLOCK
    mode = block * 0 - 1
    end = tl.minimum(block + block_count * BLOCK, vocab)
    while block < end:
        entries = block + offset
        mask = entries < end
        y = tl.load(Product + entries, mask=mask, other=0.0)
        y = logits_of(y, Bias, entries, mask, biased != 0, steep, cap, cap > 0, GENERAL)
        before, before_rest = top, rest
        top, mode, rest, above, factor = lead(y, entries, top, mode, rest)
        base = tl.maximum(top, FLOOR)
        if ENTROPY:
            gap = tl.where(above, tl.maximum(before, FLOOR) - base, 0.0)
            w = factor * (w + gap * before_rest) + tl.where(tl.arange(0, LANES) == 0, factor * gap, 0.0)
        e = tl.where(entries == mode, 0.0, exp(y - base))
        rest += tl.sum(e, 0)
        if ENTROPY:
            w += tl.sum(e * tl.maximum(y - base, -FAR), 0)
        block += BLOCK
        calm = block + BLOCK <= end
        while calm:  # until a block rises
            entries = block + offset
            y = _kept(tl.load(Product + entries), Bias, entries, biased, steep, cap, GENERAL)
            e = exp(y - base)
            calm = tl.max((tl.max(y, 0) > top).to(tl.int32), 0) == 0
            # Added up beside the question, and only kept where the block does not rise: nothing waits for the answer.
            rest = tl.where(calm, rest + tl.sum(e, 0), rest)
            if ENTROPY:
                w = tl.where(calm, w + tl.sum(e * tl.maximum(y - base, -FAR), 0), w)
            block = tl.where(calm, block + BLOCK, block)
            calm = calm & (block + BLOCK <= end)
    Parts += (split * rows + row).to(tl.int64)
    field = tl.num_programs(1).to(tl.int64) * rows
    tl.store(Parts + PART_TOP * field, top)
    tl.store(Parts + PART_REST * field, tl.sum(rest, 0))
    if ENTROPY:
        tl.store(Parts + PART_GAPS * field, tl.sum(w, 0))


@triton.jit
def _merged(Parts, row, mask, splits, rows, ENTROPY: tl.constexpr):
    """Merge the parts of rows, in double: return top, rest, and the sum of exp(y - top) (y - top)."""
    field = splits.to(tl.int64) * rows
    top = load_field(Parts, PART_TOP, field, row, mask).to(tl.float64)
    rest = load_field(Parts, PART_REST, field, row, mask).to(tl.float64)
    w = top * 0
    if ENTROPY:
        w = load_field(Parts, PART_GAPS, field, row, mask).to(tl.float64)
    for split in range(1, splits):
        Part = Parts + split * rows + row
        other = tl.load(Part + PART_TOP * field, mask=mask, other=0.0).to(tl.float64)
        other_rest = tl.load(Part + PART_REST * field, mask=mask, other=0.0).to(tl.float64)
        before = top
        top, merged, higher, gap = merge(before, rest, other, other_rest)
        if ENTROPY:
            other_w = tl.load(Part + PART_GAPS * field, mask=mask, other=0.0).to(tl.float64)
            apart = tl.where(gap == 0, 0.0, -tl.abs(other - before))
            below = w + gap * (other_w + apart * (1 + other_rest))
            w = tl.where(higher, other_w + gap * (w + apart * (1 + rest)), below)
        rest = merged
    return top, rest, w


@triton.jit(do_not_specialize=["rows", "splits", "count"])
def combine(
    Parts, Chosen, First, Row, Logprobs, Entropy, Outside, Finite, rows, splits, count,
    ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Merge the parts of rows and their chosen logits, in double; write log-probabilities, entropies and the records of Row."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = row < rows
    row = row.to(tl.int64)
    rest_top, rest, w = _merged(Parts, row, mask, splits, rows, ENTROPY)
    minus = float("-inf")
    empty = rest_top == minus
    top = rest_top
    for m in range(count):
        top = tl.maximum(top, tl.load(Chosen + row * count + m, mask=mask, other=0.0).to(tl.float64))
    skipped = rest_top == top
    apart = tl.where(empty, 0.0, rest_top - top)
    share = tl.where(empty, 0.0, tl.exp(apart))
    others = tl.where(empty, rest, tl.where(skipped, rest, share * (1 + rest)))
    gaps = tl.where(empty, 0.0, share * (w + apart * (1 + rest)))
    for m in range(count):
        y = tl.load(Chosen + row * count + m, mask=mask, other=0.0).to(tl.float64)
        first = tl.load(First + row * count + m, mask=mask, other=0) != 0
        e = tl.where(first & (y > minus), tl.exp(y - top), tl.where(y != y, y, 0.0))
        largest = first & (y == top) & (skipped == 0)
        others += tl.where(largest, 0.0, e)
        gaps += tl.where(e > 0, e * (y - top), 0.0)
        skipped = skipped | largest
    log_rest = log1p(others)
    infinity = float("inf")
    finite = (tl.abs(top) < infinity) & (log_rest < infinity)
    nan = float("nan")
    for m in range(count):
        y = tl.load(Chosen + row * count + m, mask=mask, other=0.0).to(tl.float64)
        logprob = tl.where(finite, (y - top) - log_rest, nan)
        tl.store(Logprobs + row * count + m, logprob.to(Logprobs.dtype.element_ty), mask=mask)
    dtype = Row.dtype.element_ty
    outside = tl.where(empty, minus, (apart + log1p(rest)) - log_rest)
    tl.store(Outside + row, tl.where(finite, outside, nan).to(dtype), mask=mask)
    tl.store(Finite + row, finite, mask=mask)
    store_field(Row, ROW_REST_TOP, rows, row, rest_top.to(dtype), mask)
    store_field(Row, ROW_REST_SHARE, rows, row, tl.where(empty, 0.0, 1 / (1 + rest)).to(dtype), mask)
    store_field(Row, ROW_TOP, rows, row, top.to(dtype), mask)
    store_field(Row, ROW_LOG_REST, rows, row, log_rest.to(dtype), mask)
    store_field(Row, ROW_FINITE, rows, row, finite.to(dtype), mask)
    if ENTROPY:
        mean = gaps / (1 + others)
        store_field(Row, ROW_MEAN_GAP, rows, row, mean.to(dtype), mask)
        tl.store(Entropy + row, tl.where(finite, log_rest - mean, nan).to(dtype), mask=mask)


@triton.jit
def _outside_grad(y, rest_top, rest_share, alive, slope):
    """Return the gradient of the mass outside the ids to the products; 0 for a row that has none."""
    return tl.where(alive, exp(y - rest_top) * rest_share * slope, 0.0)


@triton.jit
def _entropy_grad(y, top, share, mean_gap, finite, slope):
    """Return the gradient of the entropy to the products; 0 at entries without probability, and for a row without any."""
    a = tl.maximum(y - top, -FAR)
    return tl.where(finite, exp(a) * share * (mean_gap - a) * slope, 0.0)


@triton.jit(do_not_specialize=["biased", "rows", "block_count"])
def gradient(
    Product, stride, Bias, biased, Row, Grad, grad_stride, EntropyGrad, entropy_stride, rows, block_count, vocab,
    inner: tl.float64, outer: tl.float64, grad_scale: tl.float64,
    ENTROPY: tl.constexpr, GENERAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Read a part of a row once more; write the gradient of the mass outside the ids, and the entropy's."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    Product += row * stride
    Row += row
    dtype = Product.dtype.element_ty
    cap = number(outer, dtype)
    steep = number(inner, dtype) * tl.where(cap > 0, cap, 1.0) * number(grad_scale, dtype)
    unit = 1 / tl.where(cap > 0, cap, 1.0)
    rest_top = tl.load(Row + ROW_REST_TOP * rows)
    rest_share = tl.load(Row + ROW_REST_SHARE * rows)
    top = tl.load(Row + ROW_TOP * rows)
    share = tl.exp(-tl.load(Row + ROW_LOG_REST * rows))
    finite = tl.load(Row + ROW_FINITE * rows) != 0
    alive = finite & (rest_share > 0)
    mean_gap = top * 0
    if ENTROPY:
        mean_gap = tl.load(Row + ROW_MEAN_GAP * rows)
        EntropyGrad += row * entropy_stride
    Grad += row * grad_stride
    inner = number(inner, dtype)
    start = split * block_count * BLOCK
    end = tl.minimum(start + block_count * BLOCK, vocab)
    whole = start + tl.maximum(end - start, 0) // BLOCK * BLOCK
    for block in range(start, whole, BLOCK):
        entries = block + tl.arange(0, BLOCK)
        y = _kept(tl.load(Product + entries), Bias, entries, biased, inner, cap, GENERAL)
        slope = slope_of(y, steep, unit, cap > 0, GENERAL)
        tl.store(Grad + entries, _outside_grad(y, rest_top, rest_share, alive, slope).to(Grad.dtype.element_ty))
        if ENTROPY:
            grad = _entropy_grad(y, top, share, mean_gap, finite, slope)
            tl.store(EntropyGrad + entries, grad.to(EntropyGrad.dtype.element_ty))
    for block in range(whole, end, BLOCK):
        entries = block + tl.arange(0, BLOCK)
        mask = entries < end
        y = tl.load(Product + entries, mask=mask, other=0.0)
        y = logits_of(y, Bias, entries, mask, biased != 0, inner, cap, cap > 0, GENERAL)
        slope = slope_of(y, steep, unit, cap > 0, GENERAL)
        tl.store(Grad + entries, _outside_grad(y, rest_top, rest_share, alive, slope).to(Grad.dtype.element_ty), mask=mask)
        if ENTROPY:
            grad = _entropy_grad(y, top, share, mean_gap, finite, slope)
            tl.store(EntropyGrad + entries, grad.to(EntropyGrad.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "count"], do_not_specialize_on_alignment=["Ids"])
def at_ids(
    Ids, Chosen, First, Row, EntropyGrad, entropy_stride, rows, count, vocab,
    inner: tl.float64, outer: tl.float64, grad_scale: tl.float64,
    GENERAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the entropy's gradient at a row's ids, which `gradient` left at 0."""
    row = tl.program_id(0).to(tl.int64)
    Row += row
    dtype = Chosen.dtype.element_ty
    cap = number(outer, dtype)
    steep = number(inner, dtype) * tl.where(cap > 0, cap, 1.0) * number(grad_scale, dtype)
    top = tl.load(Row + ROW_TOP * rows)
    share = tl.exp(-tl.load(Row + ROW_LOG_REST * rows))
    finite = tl.load(Row + ROW_FINITE * rows) != 0
    for block in range(0, count, BLOCK):
        m = block + tl.arange(0, BLOCK)
        ids = tl.load(Ids + row * count + m, mask=m < count, other=-1)
        first = tl.load(First + row * count + m, mask=m < count, other=0) != 0
        y = tl.load(Chosen + row * count + m, mask=m < count, other=float("-inf"))
        slope = slope_of(y, steep, 1 / tl.where(cap > 0, cap, 1.0), cap > 0, GENERAL)
        grad = _entropy_grad(y, top, share, tl.load(Row + ROW_MEAN_GAP * rows), finite, slope)
        tl.store(EntropyGrad + row * entropy_stride + ids, grad.to(EntropyGrad.dtype.element_ty), mask=first)
