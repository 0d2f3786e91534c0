"""topd::logprob_rows for Triton: a tile of products and ids in; log-probabilities, what lies outside the ids and the gradients
out.

Formulas are those of topd/ops/linear_logprobs/eager.py. Launches of a chunk, S programs a row where rows are few:
    chosen      M logits of a row gathered; which ids are the first of their value
    leave_out   the ids' entries leave the tile
    rest        the tile read once: largest entry and normaliser of what is left, and its entropy
    combine     a row's few numbers, in double
    gradient    the tile read once more and overwritten, the entropy's gradient written beside it
    at_ids      the entropy's gradient at the ids
Bytes of a row's entry, float32 tile: 4 read; with a gradient 4 read and 4 written (2 in 16 bits) more.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from topd_kernels.shared.launch import Launch, processors, run_all, splits_of
from topd_kernels.shared.row_math import LEFT_OUT, lane_update, log1p, logits_of, merge, number, over_lanes, slope_of

PARTS, ROW = 3, 6


@triton.jit(do_not_specialize=["biased", "count"], do_not_specialize_on_alignment=["Ids"])
def _chosen(
    Product, stride, Bias, biased, Ids, Chosen, First, Slope, count, vocab, inner: tl.float64, outer: tl.float64,
    GENERAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
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
def _leave_out(Product, stride, Ids, count, vocab, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    for block in range(0, count, BLOCK):
        m = block + tl.arange(0, BLOCK)
        ids = tl.load(Ids + row * count + m, mask=m < count, other=-1)
        left = tl.full([BLOCK], LEFT_OUT, Product.dtype.element_ty)
        tl.store(Product + row * stride + ids, left, mask=(ids >= 0) & (ids < vocab))


@triton.jit(do_not_specialize=["biased", "rows", "block_count"])
def _rest(
    Product, stride, Bias, biased, Parts, rows, block_count, vocab, inner: tl.float64, outer: tl.float64,
    ENTROPY: tl.constexpr, GENERAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Parts [3, splits, rows]: top, rest, and the sum of exp(y - top) (y - top)."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    Product += row * stride
    dtype = Product.dtype.element_ty
    lanes = tl.arange(0, BLOCK)
    cap = number(outer, dtype)
    top = tl.full([BLOCK], float("-inf"), dtype)
    index = lanes
    rest = tl.zeros([BLOCK], dtype)
    w = rest
    start = split * block_count * BLOCK
    end = tl.minimum(start + block_count * BLOCK, vocab)
    for block in range(start, end, BLOCK):
        at = block + lanes
        y = tl.load(Product + at, mask=at < end, other=0.0)
        y = logits_of(y, Bias, at, at < end, biased != 0, number(inner, dtype), cap, cap > 0, GENERAL)
        gap = tl.where((y > float("-inf")) & (top > float("-inf")), y - top, 0.0)
        before = rest
        top, index, rest, above, e = lane_update(y, at, top, index, rest)
        if ENTROPY:
            w = tl.where(above, e * (w - gap * (before + 1)), w + e * gap)
    best, _, total, is_mode, factor = over_lanes(top, index, rest)
    Parts += (split * rows + row).to(tl.int64)
    field = tl.num_programs(1).to(tl.int64) * rows
    tl.store(Parts, best)
    tl.store(Parts + field, total)
    if ENTROPY:
        gap = tl.where(top > float("-inf"), top - best, 0.0)
        tl.store(Parts + 2 * field, tl.sum(tl.where(is_mode, w, factor * (w + gap * (1 + rest))), 0))


@triton.jit
def _merged(Parts, at, mask, splits, rows, ENTROPY: tl.constexpr):
    """The S parts of a row to one, in double."""
    field = splits.to(tl.int64) * rows
    top = tl.load(Parts + at, mask=mask, other=0.0).to(tl.float64)
    rest = tl.load(Parts + field + at, mask=mask, other=0.0).to(tl.float64)
    w = top * 0
    if ENTROPY:
        w = tl.load(Parts + 2 * field + at, mask=mask, other=0.0).to(tl.float64)
    for split in range(1, splits):
        Part = Parts + split * rows + at
        other = tl.load(Part, mask=mask, other=0.0).to(tl.float64)
        other_rest = tl.load(Part + field, mask=mask, other=0.0).to(tl.float64)
        before = top
        top, merged, higher, gap = merge(before, rest, other, other_rest)
        if ENTROPY:
            other_w = tl.load(Part + 2 * field, mask=mask, other=0.0).to(tl.float64)
            apart = tl.where(gap == 0, 0.0, -tl.abs(other - before))
            below = w + gap * (other_w + apart * (1 + other_rest))
            w = tl.where(higher, other_w + gap * (w + apart * (1 + rest)), below)
        rest = merged
    return top, rest, w


@triton.jit(do_not_specialize=["rows", "splits", "count"])
def _combine(
    Parts, Chosen, First, Row, Logprobs, Entropy, Outside, Finite, rows, splits, count,
    ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row [6, rows]: top of the rest and 1 / (1 + rest); top of all, log Z - top; E; whether a distribution exists."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < rows
    at = at.to(tl.int64)
    rest_top, rest, w = _merged(Parts, at, mask, splits, rows, ENTROPY)
    minus = float("-inf")
    empty = rest_top == minus
    top = rest_top
    for m in range(count):
        top = tl.maximum(top, tl.load(Chosen + at * count + m, mask=mask, other=0.0).to(tl.float64))
    skipped = rest_top == top
    apart = tl.where(empty, 0.0, rest_top - top)
    share = tl.where(empty, 0.0, tl.exp(apart))
    others = tl.where(empty, rest, tl.where(skipped, rest, share * (1 + rest)))
    gaps = tl.where(empty, 0.0, share * (w + apart * (1 + rest)))
    for m in range(count):
        y = tl.load(Chosen + at * count + m, mask=mask, other=0.0).to(tl.float64)
        first = tl.load(First + at * count + m, mask=mask, other=0) != 0
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
        y = tl.load(Chosen + at * count + m, mask=mask, other=0.0).to(tl.float64)
        found = tl.where(finite, (y - top) - log_rest, nan)
        tl.store(Logprobs + at * count + m, found.to(Logprobs.dtype.element_ty), mask=mask)
    dtype = Row.dtype.element_ty
    outside = tl.where(empty, minus, (apart + log1p(rest)) - log_rest)
    tl.store(Outside + at, tl.where(finite, outside, nan).to(dtype), mask=mask)
    tl.store(Finite + at, finite, mask=mask)
    tl.store(Row + at, rest_top.to(dtype), mask=mask)
    tl.store(Row + rows + at, tl.where(empty, 0.0, 1 / (1 + rest)).to(dtype), mask=mask)
    tl.store(Row + 2 * rows + at, top.to(dtype), mask=mask)
    tl.store(Row + 3 * rows + at, log_rest.to(dtype), mask=mask)
    tl.store(Row + 5 * rows + at, finite.to(dtype), mask=mask)
    if ENTROPY:
        mean = gaps / (1 + others)
        tl.store(Row + 4 * rows + at, mean.to(dtype), mask=mask)
        tl.store(Entropy + at, tl.where(finite, log_rest - mean, nan).to(dtype), mask=mask)


@triton.jit(do_not_specialize=["biased", "rows", "block_count"])
def _gradient(
    Product, stride, Bias, biased, Row, Grad, grad_stride, EntropyGrad, entropy_stride, rows, block_count, vocab,
    inner: tl.float64, outer: tl.float64, grad_scale: tl.float64,
    ENTROPY: tl.constexpr, GENERAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    Product += row * stride
    Row += row
    dtype = Product.dtype.element_ty
    cap = number(outer, dtype)
    steep = number(inner, dtype) * tl.where(cap > 0, cap, 1.0) * number(grad_scale, dtype)
    unit = 1 / tl.where(cap > 0, cap, 1.0)
    rest_top = tl.load(Row)
    rest_share = tl.load(Row + rows)
    top = tl.load(Row + 2 * rows)
    share = tl.exp(-tl.load(Row + 3 * rows))
    finite = tl.load(Row + 5 * rows) != 0
    alive = finite & (rest_share > 0)
    start = split * block_count * BLOCK
    end = tl.minimum(start + block_count * BLOCK, vocab)
    for block in range(start, end, BLOCK):
        at = block + tl.arange(0, BLOCK)
        mask = at < end
        y = tl.load(Product + at, mask=mask, other=0.0)
        y = logits_of(y, Bias, at, mask, biased != 0, number(inner, dtype), cap, cap > 0, GENERAL)
        slope = slope_of(y, steep, unit, cap > 0, GENERAL)
        grad = tl.where(alive, tl.exp(y - rest_top) * rest_share * slope, 0.0)
        tl.store(Grad + row * grad_stride + at, grad.to(Grad.dtype.element_ty), mask=mask)
        if ENTROPY:
            a = tl.where(y > float("-inf"), y - top, 0.0)
            p = tl.where(y > float("-inf"), tl.exp(a) * share, 0.0)
            grad = tl.where(finite, -p * (a - tl.load(Row + 4 * rows)) * slope, 0.0)
            tl.store(EntropyGrad + row * entropy_stride + at, grad.to(EntropyGrad.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "count"], do_not_specialize_on_alignment=["Ids"])
def _at_ids(
    Ids, Chosen, First, Row, EntropyGrad, entropy_stride, rows, count, vocab,
    inner: tl.float64, outer: tl.float64, grad_scale: tl.float64,
    GENERAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    Row += row
    dtype = Chosen.dtype.element_ty
    cap = number(outer, dtype)
    steep = number(inner, dtype) * tl.where(cap > 0, cap, 1.0) * number(grad_scale, dtype)
    top = tl.load(Row + 2 * rows)
    share = tl.exp(-tl.load(Row + 3 * rows))
    finite = tl.load(Row + 5 * rows) != 0
    for block in range(0, count, BLOCK):
        m = block + tl.arange(0, BLOCK)
        ids = tl.load(Ids + row * count + m, mask=m < count, other=-1)
        first = tl.load(First + row * count + m, mask=m < count, other=0) != 0
        y = tl.load(Chosen + row * count + m, mask=m < count, other=float("-inf"))
        a = tl.where(y > float("-inf"), y - top, 0.0)
        p = tl.where(y > float("-inf"), tl.exp(a) * share, 0.0)
        slope = slope_of(y, steep, 1 / tl.where(cap > 0, cap, 1.0), cap > 0, GENERAL)
        grad = tl.where(finite, -p * (a - tl.load(Row + 4 * rows)) * slope, 0.0)
        tl.store(EntropyGrad + row * entropy_stride + ids, grad.to(EntropyGrad.dtype.element_ty), mask=first)


class Blocks(NamedTuple):
    """Entries and ids that a program takes at a time, its warps, and the rows of a program where rows are few numbers each."""

    entries: int
    ids: int
    num_warps: int = 4
    rows: int = 64


def blocks_of(itemsize: int) -> Blocks:
    """Block sizes; a small vocabulary or few ids take the same, masked."""
    return Blocks(2048 if itemsize == 4 else 1024, 64)


class Outputs(NamedTuple):
    """logprobs [C, M], entropy [C] or [0], outside [C], first [C, M], slope [C, M] or [0, M], finite [C]."""

    logprobs: Tensor
    entropy: Tensor
    outside: Tensor
    first: Tensor
    slope: Tensor
    finite: Tensor


class Spec(NamedTuple):
    """The numbers of a call, in the order of the op's arguments."""

    scale: float
    softcap: float | None
    temperature: float


def launches(
    product: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    spec: Spec,
    entropy_tile: Tensor | None,
    grad: Tensor | None,
    entropy: bool,
    *,
    grad_scale: float = 1.0,
    splits: int | None = None,
) -> tuple[list[Launch], Outputs]:
    """The launches of a chunk, and what they will have written. `grad` [C, V] is of any floating dtype; it may be the tile.
    Both gradients are multiplied by grad_scale."""
    (rows, vocab), count = product.shape, ids.shape[1]
    blocks = blocks_of(product.itemsize)
    entries = triton.cdiv(vocab, blocks.entries)
    splits = splits or splits_of(rows, entries, processors(product))
    capped = spec.softcap is not None
    out = Outputs(
        product.new_empty(ids.shape),
        product.new_empty(rows if entropy else 0),
        product.new_empty(rows),
        product.new_empty(ids.shape, dtype=torch.bool),
        product.new_empty(rows if capped else 0, count),
        product.new_empty(rows, dtype=torch.bool),
    )
    general = bias is not None or capped
    arguments = {
        "Product": product,
        "stride": product.stride(0),
        "Bias": product if bias is None else bias,
        "biased": int(bias is not None),
        "Ids": ids.contiguous(),
        "Chosen": product.new_empty(ids.shape),
        "First": out.first,
        "Slope": out.slope if capped or not general else product.new_empty(ids.shape),
        "Parts": product.new_empty(PARTS, splits, rows),
        "Row": product.new_empty(ROW, rows),
        "Logprobs": out.logprobs,
        "Entropy": out.entropy,
        "Outside": out.outside,
        "Finite": out.finite,
        "Grad": product if grad is None else grad,
        "grad_stride": (product if grad is None else grad).stride(0),
        "EntropyGrad": product if entropy_tile is None else entropy_tile,
        "entropy_stride": (product if entropy_tile is None else entropy_tile).stride(0),
        "rows": rows,
        "splits": splits,
        "block_count": triton.cdiv(entries, splits),
        "count": count,
        "vocab": vocab,
        "inner": spec.scale / (spec.temperature if spec.softcap is None else spec.softcap),
        "outer": 0.0 if spec.softcap is None else spec.softcap / spec.temperature,
        "grad_scale": grad_scale,
    }
    return _order(arguments, blocks, general, grad is not None, entropy, entropy_tile is not None), out


def _order(
    arguments: dict[str, Any], blocks: Blocks, general: bool, grad: bool, entropy: bool, entropy_grad: bool
) -> list[Launch]:
    """Each kernel with those arguments and constants that it knows."""
    rows = arguments["rows"]
    each_row, tile = (rows,), (rows, arguments["splits"])

    def launch(kernel: Any, grid: tuple[int, ...], block: int, *, entropy: bool = False) -> Launch:
        known = {"GENERAL": general, "ENTROPY": entropy, "BLOCK": block}
        return Launch.of(kernel, grid, arguments, known, blocks.num_warps)

    order = []
    if arguments["count"]:
        order += [launch(_chosen, each_row, blocks.ids), launch(_leave_out, each_row, blocks.ids)]
    order.append(launch(_rest, tile, blocks.entries, entropy=entropy))
    order.append(launch(_combine, (triton.cdiv(rows, blocks.rows),), blocks.rows, entropy=entropy))
    if grad:
        order.append(launch(_gradient, tile, blocks.entries, entropy=entropy_grad))
        if entropy_grad and arguments["count"]:
            order.append(launch(_at_ids, each_row, blocks.ids))
    return order


def logprob_rows(
    product: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    scale: float,
    softcap: float | None,
    temperature: float,
    entropy_tile: Tensor | None,
    grad: bool,
    entropy: bool,
    grad_tile: Tensor | None = None,
    grad_scale: float = 1.0,
) -> tuple[Tensor, ...]:
    """The op `topd::logprob_rows`."""
    to = product if grad_tile is None else grad_tile
    second = entropy_tile if grad and entropy else None
    spec = Spec(scale, softcap, temperature)
    order, out = launches(product, bias, ids, spec, second, to if grad else None, entropy, grad_scale=grad_scale)
    run_all(order)
    return tuple(out)
