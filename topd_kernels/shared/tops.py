"""The largest entry of a row for Triton, its place, and the sum of exp(y - top) over the others, which keeps its digits where
the largest has nearly all the probability: entry by entry, block by block, part by part."""

import triton
import triton.language as tl

from topd_kernels.shared.row_math import exp

# Entries of a block that one sum is kept of.
LANE_ENTRIES = tl.constexpr(4)
# Above every entry's number.
NO_ENTRY = tl.constexpr(2147483647)


@triton.jit
def lead(y, entries, top, mode, rest):
    """Take a block's largest entry [U, LANES] for the mode where it is above: return top, mode, the sum over the others
    [LANES] so far, whether it was above, and exp(top before - top)."""
    highest = tl.max(tl.max(y, 0), 0)
    first = tl.min(tl.min(tl.where(y == highest, entries, NO_ENTRY), 0), 0)
    above = highest > top
    factor = tl.where(above, exp(top - highest), 1.0)
    before = tl.where(tl.arange(0, rest.shape[0]) == 0, tl.where(above, factor, 0.0), 0.0)
    return tl.where(above, highest, top), tl.where(above, first, mode), rest * factor + before, above, factor


@triton.jit
def lane_update(y, entries, top, index, rest):
    """Take one more entry a lane: return its largest so far, where that is, the sum of exp(y - top) over the others, whether
    the new one is the largest, and exp(-|y - top|)."""
    above = y > top
    e = tl.where(y == float("-inf"), 0.0, exp(-tl.abs(y - top)))
    rest = tl.where(above, (rest + 1) * e, rest + e)
    return tl.where(above, y, top), tl.where(above, entries, index), rest, above, e


@triton.jit
def over_lanes(top, index, rest):
    """Merge the lanes: return the largest entry (the first of equals), its index, the sum over the others, which lane it is in,
    and each lane's factor."""
    best = tl.max(top, 0)
    first = tl.min(tl.where(top == best, index, NO_ENTRY), 0)
    is_mode = (top == best) & (index == first)
    factor = tl.where(top == float("-inf"), 0.0, exp(top - best))
    return best, first, tl.sum(tl.where(is_mode, rest, factor * (1 + rest)), 0), is_mode, factor


@triton.jit
def merge(top, rest, other_top, other_rest):
    """Merge two parts of a row: return top, rest, whether the other's is larger, and exp(lower - upper)."""
    higher = other_top > top
    upper = tl.where(higher, other_top, top)
    lower = tl.where(higher, top, other_top)
    gap = tl.where(lower == float("-inf"), 0.0, exp(lower - upper))
    merged = tl.where(higher, other_rest + gap * (1 + rest), rest + gap * (1 + other_rest))
    return upper, merged, higher, gap
