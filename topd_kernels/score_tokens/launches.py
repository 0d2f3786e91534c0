"""topd::score_tokens, fully fused: hidden states and heads in, nine scores a token out; logits live in registers only.

One program takes BM rows and a run of vocabulary blocks. For each block it forms both sides' [BM, BN] logits (two `tl.dot`
loops over the hidden widths), makes them one group and merges it into the group so far (`chain_rule`): one pass over both
heads, two matrix products in all, exact between near-equal sides. The runs of a row ("splits") are merged by a last kernel in
the same way. Where one vocabulary is wider, the mass of its tail is found with that side's product alone.

Read per program and block: BN rows of both heads and, again, its own BM rows of both hidden states; a head is read from memory
once for all the rows that run at the same time. Written: 13 floats per row and split, 9 per row. Sums and scores are float32.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from topd_kernels.score_tokens.chain_rule import (
    FLOOR,
    GROUP_FLOATS,
    empty_group,
    group_of,
    load_group,
    log_mass_step,
    merge,
    merge_masses,
    side_of,
    store_group,
)
from topd_kernels.shared.launch import Launch, interpreted, processors, run_all
from topd_kernels.shared.row_math import log1p, tanh

SCORES = tl.constexpr(9)  # topd.scores.FIELDS
STATES = tl.constexpr(GROUP_FLOATS.value + 2)  # of a row and split: its group, both logits of its token
FINISH_ROWS = 64


@triton.jit
def _product(Hidden, Weight, row, entry, width, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WIDEN: tl.constexpr):
    """hidden weightᵀ [BM, BN] of rows and entries that all exist, near enough to the pointers for 32-bit offsets. WIDEN: the
    interpreter's dot does not know bfloat16."""
    k = tl.arange(0, BK)
    h_at = row[:, None] * width + k[None, :]
    w_at = entry[None, :] * width + k[:, None]
    product = tl.zeros((BM, BN), tl.float32)
    for start in tl.range(0, width, BK):
        inside = k < width - start
        h = tl.load(Hidden + start + h_at, mask=inside[None, :], other=0.0)
        w = tl.load(Weight + start + w_at, mask=inside[:, None], other=0.0)
        if WIDEN:
            h = h.to(tl.float32)
            w = w.to(tl.float32)
        product = tl.dot(h, w, product, input_precision="ieee")
    return product


@triton.jit
def _logits(product, Bias, at, mask, has_bias, inner, outer, capped, GENERAL: tl.constexpr):
    """As row_math.logits_of, with FLOOR for -inf; NaN stays."""
    y = product
    if GENERAL:
        y += tl.load(Bias + at, mask=mask & has_bias, other=0.0)
    y *= inner
    if GENERAL:
        if capped:
            y = outer * tanh(y)
    y = tl.where(y < FLOOR, FLOOR, y)
    return tl.where(mask, y, FLOOR)


@triton.jit(do_not_specialize=["rows", "vocab", "run"], do_not_specialize_on_alignment=["Tokens"])
def _score_blocks(
    StudentHidden, StudentWeight, StudentBias, student_width, student_has_bias, student_inner, student_outer, student_capped,
    TeacherHidden, TeacherWeight, TeacherBias, teacher_width, teacher_has_bias, teacher_inner, teacher_outer, teacher_capped,
    Tokens, has_tokens, States, rows, vocab, run,
    GENERAL: tl.constexpr, WIDEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Entries [split * run, (split + 1) * run) of both sides as one group: States [splits, STATES, rows]."""
    first_row = tl.program_id(0) * BM
    first = tl.program_id(1) * run
    local_row = tl.minimum(tl.arange(0, BM), rows - 1 - first_row)
    column = tl.arange(0, BN)
    StudentHidden += first_row.to(tl.int64) * student_width
    TeacherHidden += first_row.to(tl.int64) * teacher_width
    StudentWeight += first.to(tl.int64) * student_width
    TeacherWeight += first.to(tl.int64) * teacher_width
    row = first_row + tl.arange(0, BM)
    s_token = tl.full((BM,), FLOOR, tl.float32)
    t_token = s_token
    group = empty_group(BM)
    for start in tl.range(first, tl.minimum(first + run, vocab), BN):
        entry = start + column
        held = tl.minimum(column, vocab - 1 - start)
        mask = (entry < vocab)[None, :]
        at = entry[None, :]
        s = _product(StudentHidden, StudentWeight, local_row, held, student_width, BM, BN, BK, WIDEN)
        s = _logits(s, StudentBias, at, mask, student_has_bias, student_inner, student_outer, student_capped, GENERAL)
        student = side_of(s, entry)
        t = _product(TeacherHidden, TeacherWeight, local_row, held, teacher_width, BM, BN, BK, WIDEN)
        t = _logits(t, TeacherBias, at, mask, teacher_has_bias, teacher_inner, teacher_outer, teacher_capped, GENERAL)
        teacher = side_of(t, entry)
        StudentWeight += BN * student_width
        TeacherWeight += BN * teacher_width
        token = tl.load(Tokens + row, mask=(row < rows) & has_tokens, other=-1)
        here = (token >= start) & (token < start + BN)
        if tl.max(here.to(tl.int32), 0) > 0:
            is_token = at == token[:, None]
            s_token = tl.where(here, tl.max(tl.where(is_token, s, FLOOR), 1), s_token)
            t_token = tl.where(here, tl.max(tl.where(is_token, t, FLOOR), 1), t_token)
        block = group_of(s, t, student, teacher)
        # A branch, though merging with an empty group would do: the compiler then keeps the merge's work apart from the tile's.
        if start == first:
            group = block
        else:
            group = merge(group, block)
    States += tl.program_id(1).to(tl.int64) * STATES * rows
    States += row
    store_group(States, group, rows, row < rows)
    tl.store(States + GROUP_FLOATS * rows, s_token, mask=row < rows)
    tl.store(States + (GROUP_FLOATS + 1) * rows, t_token, mask=row < rows)


@triton.jit(do_not_specialize=["rows", "vocab", "full_vocab", "run"])
def _score_tail(
    Hidden, Weight, Bias, width, has_bias, inner, outer, capped, Masses, rows, vocab, full_vocab, run,
    GENERAL: tl.constexpr, WIDEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The mass of a run of the entries [vocab, full_vocab) of the wider side, top and rest: Masses [splits, 2, rows]."""
    first_row = tl.program_id(0) * BM
    first = vocab + tl.program_id(1) * run
    local_row = tl.minimum(tl.arange(0, BM), rows - 1 - first_row)
    column = tl.arange(0, BN)
    Hidden += first_row.to(tl.int64) * width
    Weight += first.to(tl.int64) * width
    top = tl.full((BM,), FLOOR, tl.float32)
    rest = tl.zeros((BM,), tl.float32)
    for start in tl.range(first, tl.minimum(first + run, full_vocab), BN):
        entry = start + column
        y = _product(Hidden, Weight, local_row, tl.minimum(column, full_vocab - 1 - start), width, BM, BN, BK, WIDEN)
        Weight += BN * width
        mask = (entry < full_vocab)[None, :]
        y = _logits(y, Bias, entry[None, :], mask, has_bias, inner, outer, capped, GENERAL)
        block_top = tl.max(y, 1)
        block_rest = tl.sum(tl.exp(y - block_top[:, None]), 1) - 1
        top, rest, _ = merge_masses(top, rest, block_top, block_rest)
    row = first_row + tl.arange(0, BM)
    inside = row < rows
    at = Masses + tl.program_id(1).to(tl.int64) * 2 * rows + row
    tl.store(at, top, mask=inside)
    tl.store(at + rows, rest, mask=inside)


@triton.jit
def _token_logprob(side, token):
    """log p of a logit; -inf for a token without probability or outside the vocabulary."""
    return tl.where(token <= FLOOR, float("-inf"), (token - side.top) - log1p(side.rest))


@triton.jit
def _lost_mass(side, Masses, splits, rows, row, inside):
    """Probability of the tail in the side's full distribution; 0 without splits."""
    top = tl.full(side.top.shape, FLOOR, tl.float32)
    rest = tl.zeros(side.top.shape, tl.float32)
    At = Masses + row
    for _ in tl.range(0, splits):
        tail_top = tl.load(At, mask=inside, other=FLOOR)
        top, rest, _higher = merge_masses(top, rest, tail_top, tl.load(At + rows, mask=inside, other=0.0))
        At += 2 * rows
    share = 1 / (1 + tl.exp(-log_mass_step(side.top, side.rest, top, rest)))
    return tl.where(top == float("inf"), 1.0, share)


@triton.jit(do_not_specialize=["rows", "splits", "student_tail_splits", "teacher_tail_splits"])
def _score_finish(
    States, splits, StudentTail, student_tail_splits, TeacherTail, teacher_tail_splits, has_tokens, Scores, rows,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The splits of each row merged, in order, to its scores: Scores [9, rows] as topd.scores.FIELDS."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    s_token = tl.full((BLOCK,), FLOOR, tl.float32)
    t_token = s_token
    group = empty_group(BLOCK)
    At = States + row
    for _ in tl.range(0, splits):
        group = merge(group, load_group(At, rows, inside))
        s_token = tl.maximum(s_token, tl.load(At + GROUP_FLOATS * rows, mask=inside, other=FLOOR))
        t_token = tl.maximum(t_token, tl.load(At + (GROUP_FLOATS + 1) * rows, mask=inside, other=FLOOR))
        At += STATES * rows
    s = group.student
    t = group.teacher
    exists = (s.top > FLOOR) & (t.top > FLOOR) & (s.top < float("inf")) & (t.top < float("inf"))
    exists = exists & (s.rest < float("inf")) & (t.rest < float("inf"))
    zero = tl.zeros((BLOCK,), tl.float32)
    values = (
        group.forward,
        group.reverse,
        s.entropy,
        t.entropy,
        tl.where(has_tokens, _token_logprob(s, s_token), zero),
        tl.where(has_tokens, _token_logprob(t, t_token), zero),
        tl.where(s.mode == t.mode, zero + 1, zero),
        _lost_mass(s, StudentTail, student_tail_splits, rows, row, inside),
        _lost_mass(t, TeacherTail, teacher_tail_splits, rows, row, inside),
    )
    for i in tl.static_range(SCORES):
        tl.store(Scores + i * rows + row, tl.where(exists, values[i], float("nan")), mask=inside)


class Blocks(NamedTuple):
    """Rows, entries and hidden columns of a tile, and the warps that work on it."""

    rows: int
    entries: int
    columns: int
    warps: int


class Operands(NamedTuple):
    """One side: hidden [N, H], weight [V, H], bias [V] or None, and its numbers."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None

    def contiguous(self) -> "Operands":
        bias = None if self.bias is None else self.bias.contiguous()
        return self._replace(hidden=self.hidden.contiguous(), weight=self.weight.contiguous(), bias=bias)


def blocks_of(student: torch.dtype, teacher: torch.dtype, *, aligned: bool) -> Blocks:
    """Tiles of which no kernel spills on any target that `tools.binaries` knows: 16 entries of a tile to a thread, or fewer.
    `aligned`: the widths are multiples of 16; other rows are loaded entry by entry, which takes registers."""
    if student.itemsize != teacher.itemsize:
        return Blocks(32, 32, 32, 4 if aligned else 8)
    if student.itemsize > 2:
        return Blocks(64, 32, 32 if aligned else 16, 8)
    return Blocks(64, 64, 64, 8) if aligned else Blocks(64, 32, 32, 8)


def splits_of(row_blocks: int, vocab_blocks: int, multiprocessors: int) -> int:
    """Programs that share a row's vocabulary: up to four a multiprocessor in all, each with four blocks at least."""
    return max(1, min(4 * multiprocessors // max(1, row_blocks), vocab_blocks // 4, 256))


def _side_arguments(side: Operands, temperature: float) -> dict[str, Any]:
    capped = side.softcap is not None
    softcap = side.softcap if side.softcap is not None else temperature
    return {
        "hidden": side.hidden,
        "weight": side.weight,
        "bias": side.weight if side.bias is None else side.bias,
        "width": side.hidden.shape[1],
        "has_bias": side.bias is not None,
        "inner": float(side.scale / softcap),
        "outer": float(softcap / temperature),
        "capped": capped,
    }


def _tail(side: Operands, arguments: dict[str, Any], vocab: int, constants: dict[str, Any], blocks: Blocks) -> Launch:
    """The kernel for the entries of the wider side from vocab on; its Masses [splits, 2, N] are among the arguments."""
    rows, full_vocab = side.hidden.shape[0], side.weight.shape[0]
    row_blocks, tail_blocks = triton.cdiv(rows, blocks.rows), triton.cdiv(full_vocab - vocab, blocks.entries)
    per_split = triton.cdiv(tail_blocks, splits_of(row_blocks, tail_blocks, processors(side.hidden)))
    splits = triton.cdiv(tail_blocks, per_split)
    masses = side.hidden.new_empty((splits, 2, rows), dtype=torch.float32)
    run = per_split * blocks.entries
    numbers = {name.capitalize() if name in ("hidden", "weight", "bias") else name: value for name, value in arguments.items()}
    numbers |= {"Masses": masses, "rows": rows, "vocab": vocab, "full_vocab": full_vocab, "run": run}
    return Launch(_score_tail, (row_blocks, splits), numbers, constants, blocks.warps, 255)


def launches(
    student: Operands,
    teacher: Operands,
    tokens: Tensor | None,
    temperature: float,
    *,
    blocks: Blocks | None = None,
    splits: int | None = None,
) -> tuple[list[Launch], Tensor]:
    """What computes Scores [9, N] float32, and that tensor. The tile, and how many programs at most share a row's vocabulary,
    are chosen here unless they are given."""
    student, teacher = student.contiguous(), teacher.contiguous()
    rows = student.hidden.shape[0]
    vocab = min(student.weight.shape[0], teacher.weight.shape[0])
    aligned = student.hidden.shape[1] % 16 == teacher.hidden.shape[1] % 16 == 0
    blocks = blocks or blocks_of(student.weight.dtype, teacher.weight.dtype, aligned=aligned)
    row_blocks, vocab_blocks = triton.cdiv(rows, blocks.rows), triton.cdiv(vocab, blocks.entries)
    splits = splits or splits_of(row_blocks, vocab_blocks, processors(student.hidden))
    run = triton.cdiv(vocab_blocks, splits) * blocks.entries
    splits = triton.cdiv(vocab, run)
    states = student.hidden.new_empty((splits, STATES.value, rows), dtype=torch.float32)
    scores = student.hidden.new_empty((SCORES.value, rows), dtype=torch.float32)

    constants = {
        "GENERAL": any(side.bias is not None or side.softcap is not None for side in (student, teacher)),
        "WIDEN": interpreted(_score_blocks),
        "BM": blocks.rows,
        "BN": blocks.entries,
        "BK": blocks.columns,
    }
    sides = {"student": _side_arguments(student, temperature), "teacher": _side_arguments(teacher, temperature)}
    arguments = {
        (f"{name.capitalize()}{key.capitalize()}" if isinstance(value, Tensor) else f"{name}_{key}"): value
        for name, side in sides.items()
        for key, value in side.items()
    }
    shared = {"has_tokens": tokens is not None, "rows": rows}
    tokens = states.new_empty(1, dtype=torch.int64) if tokens is None else tokens.contiguous()
    arguments |= shared | {"Tokens": tokens, "States": states, "vocab": vocab, "run": run}
    found = [Launch(_score_blocks, (row_blocks, splits), arguments, constants, blocks.warps)]
    finish = shared | {"States": states, "splits": splits, "Scores": scores}
    for name, side in (("student", student), ("teacher", teacher)):
        finish |= {f"{name.capitalize()}Tail": states, f"{name}_tail_splits": 0}
        if side.weight.shape[0] > vocab:
            tail = _tail(side, sides[name], vocab, constants, blocks)
            found.append(tail)
            masses = tail.arguments["Masses"]
            finish |= {f"{name.capitalize()}Tail": masses, f"{name}_tail_splits": masses.shape[0]}
    found.append(Launch(_score_finish, (triton.cdiv(rows, FINISH_ROWS),), finish, {"BLOCK": FINISH_ROWS}, 2))
    return found, scores


def score_tokens(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    tokens: Tensor | None,
    student_scale: float,
    student_softcap: float | None,
    teacher_scale: float,
    teacher_softcap: float | None,
    temperature: float,
) -> Tensor:
    """topd::score_tokens: scores [9, N] float32."""
    student = Operands(student_hidden, student_weight, student_bias, student_scale, student_softcap)
    teacher = Operands(teacher_hidden, teacher_weight, teacher_bias, teacher_scale, teacher_softcap)
    found, scores = launches(student, teacher, tokens, temperature)
    run_all(found)
    return scores
