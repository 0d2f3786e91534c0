"""topd::divergence_rows for Triton: two tiles of products in; divergences, scores and the gradient to the student's product
out.

Formulas are those of topd/ops/linear_divergence/eager.py. Launches of a chunk, S programs a row where rows are few:
    statistics  both tiles read once: largest entries, normalisers, and the reverse KL's centre E, each online
    constants   S parts of a row to its numbers
    sweep       both tiles read once: value, scores and, for the forward and the reverse KL, the gradient
    gradient    both tiles once more, for the divergences whose E is known only after the sweep
    finish      S parts of a row's sums to its value and scores
Bytes of a row's entry, float32 tiles: 8 + 8 read, and with a gradient 4 written (2 in 16 bits); 8 more read where E comes late.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from topd_kernels.divergence_rows.statistics import PARTS, ROW, constants, logits_pair, statistics
from topd_kernels.divergence_rows.terms import FORWARD_KL, REVERSE_KL, kind_of, log_ratio, term_of
from topd_kernels.shared.launch import Launch, processors, run_all, splits_of
from topd_kernels.shared.row_math import FAR, expm1, held, kl_term, logits_of, number, phi_pair, slope_of

SUMS, SCORES = 6, 9
MAX_VOCAB = 1 << 24  # an index is kept in a float32


@triton.jit(
    do_not_specialize=["rows", "splits", "biases", "has_tokens", "block_count"], do_not_specialize_on_alignment=["Tokens"]
)
def _sweep(
    Student, Teacher, student_stride, teacher_stride, StudentBias, TeacherBias, biases, Row, Tokens, has_tokens, Sums, Grad,
    grad_stride, rows, splits, block_count, vocab, student_width,
    student_inner: tl.float64, student_outer: tl.float64, teacher_inner: tl.float64, teacher_outer: tl.float64,
    parameter: tl.float64, complement: tl.float64, hard_weight: tl.float64, grad_scale: tl.float64,
    KIND: tl.constexpr, VALUE: tl.constexpr, SCORES: tl.constexpr, GRAD: tl.constexpr, GENERAL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """VALUE: partial sums of the value, E and scores into Sums [6, splits, rows]. GRAD: the gradient into Grad."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    Student += row * student_stride
    Teacher += row * teacher_stride
    Row += row
    dtype = Student.dtype.element_ty
    parameter = number(parameter, dtype)
    complement = number(complement, dtype)
    s_top = tl.load(Row)
    s_log = tl.load(Row + 2 * rows)
    s_share = tl.load(Row + 3 * rows)
    t_top = tl.load(Row + 4 * rows)
    t_log = tl.load(Row + 6 * rows)
    t_share = tl.load(Row + 7 * rows)
    finite = tl.load(Row + 8 * rows) != 0
    rest_gap = t_log - s_log
    a_mode = s_top * 0
    if KIND >= REVERSE_KL:  # A is taken relative to the student's most likely entry
        mode = tl.load(Row + rows).to(tl.int64)
        outer_t = number(teacher_outer, dtype)
        y_mode = logits_of(tl.load(Teacher + mode), TeacherBias, mode, finite, (biases & 2) != 0, number(teacher_inner, dtype),
                           outer_t, outer_t > 0, GENERAL)  # fmt: skip
        d_mode = log_ratio(s_top, y_mode, s_top, t_top, rest_gap)
        _, a_mode, _ = term_of(tl.exp(y_mode - t_top) * t_share, s_share, d_mode, parameter, complement, KIND)
    centre = s_top * 0
    token = row * 0 - 1
    token_part = s_top * 0
    hard = s_top * 0
    dead = False
    if GRAD:
        if KIND == REVERSE_KL:
            centre = tl.load(Row + 11 * rows)
            dead = tl.load(Row + 10 * rows) != 0
        elif KIND != FORWARD_KL:
            field = splits.to(tl.int64) * rows
            for sharer in range(splits):
                centre += tl.load(Sums + field + sharer * rows + row)
        if has_tokens != 0:
            token = tl.load(Tokens + row)
            hard = number(hard_weight, dtype)
            token_part = hard * expm1(tl.load(Row + 12 * rows))
    outer_s = number(student_outer, dtype)
    inner_s = number(student_inner, dtype)
    steep = tl.where(outer_s > 0, inner_s * outer_s, inner_s) * number(grad_scale, dtype)
    unit = 1 / tl.where(outer_s > 0, outer_s, 1.0)

    lanes = tl.arange(0, BLOCK)
    zero = tl.zeros([BLOCK], dtype)
    value, centres, forward, reverse, s_entropy, t_entropy = zero, zero, zero, zero, zero, zero
    start = split * block_count * BLOCK
    end = tl.minimum(start + block_count * BLOCK, vocab)
    for block in range(start, end, BLOCK):
        at = block + lanes
        mask = at < end
        ys, yt = logits_pair(Student, Teacher, StudentBias, TeacherBias, at, mask, biases,
                              student_inner, student_outer, teacher_inner, teacher_outer, GENERAL)  # fmt: skip
        d = log_ratio(ys, yt, s_top, t_top, rest_gap)
        p_student = tl.exp(ys - s_top) * s_share
        p_teacher = tl.exp(yt - t_top) * t_share
        term, a, part = term_of(p_teacher, p_student, d, parameter, complement, KIND)
        if KIND >= REVERSE_KL:
            a -= a_mode
            part = p_student * a
        if VALUE:
            value += term
            centres += part
        if SCORES:
            near = tl.abs(d) <= 1
            phi_plus, phi_minus = phi_pair(d)
            forward += kl_term(p_teacher, p_student, d, near, phi_plus)
            reverse += kl_term(p_student, p_teacher, -d, near, phi_minus)
            s_entropy -= p_student * tl.maximum((ys - s_top) - s_log, -FAR)
            t_entropy -= p_teacher * tl.maximum((yt - t_top) - t_log, -FAR)
        if GRAD:
            if KIND >= REVERSE_KL:
                grad = tl.where(dead, 0.0, p_student * (a - centre))
            else:
                grad = a - p_student * centre
            grad += tl.where(at == token, token_part, hard * p_student)
            grad *= slope_of(ys, steep, unit, outer_s > 0, GENERAL)
            tl.store(Grad + row * grad_stride + at, held(tl.where(finite, grad, 0.0), Grad.dtype.element_ty), mask=mask)
    if GRAD:
        if split == 0:
            for block in range(vocab, student_width, BLOCK):
                beyond = block + lanes
                nothing = tl.zeros([BLOCK], Grad.dtype.element_ty)
                tl.store(Grad + row * grad_stride + beyond, nothing, mask=beyond < student_width)
    if VALUE:
        Sums += split * rows + row
        field = splits.to(tl.int64) * rows
        tl.store(Sums, tl.sum(value, 0))
        tl.store(Sums + field, tl.sum(centres, 0))
        if SCORES:
            tl.store(Sums + 2 * field, tl.sum(forward, 0))
            tl.store(Sums + 3 * field, tl.sum(reverse, 0))
            tl.store(Sums + 4 * field, tl.sum(s_entropy, 0))
            tl.store(Sums + 5 * field, tl.sum(t_entropy, 0))


@triton.jit
def _summed(Sums, at, mask, splits, rows, field, FIELD: tl.constexpr):
    total = tl.load(Sums + FIELD * field + at, mask=mask, other=0.0)
    for split in range(1, splits):
        total += tl.load(Sums + FIELD * field + split * rows + at, mask=mask, other=0.0)
    return total


@triton.jit(do_not_specialize=["rows", "splits", "has_tokens"])
def _finish(
    Row, Sums, Value, Scores, Finite, rows, splits, has_tokens, hard_weight: tl.float64,
    KIND: tl.constexpr, SCORES: tl.constexpr, TAILS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < rows
    at = at.to(tl.int64)
    field = splits.to(tl.int64) * rows
    finite = tl.load(Row + 8 * rows + at, mask=mask, other=0.0) != 0
    only_t = tl.load(Row + 9 * rows + at, mask=mask, other=0.0) != 0
    only_s = tl.load(Row + 10 * rows + at, mask=mask, other=0.0) != 0
    infinity = float("inf")
    nan = float("nan")
    value = _summed(Sums, at, mask, splits, rows, field, 0)
    if KIND == FORWARD_KL:
        value = tl.where(only_t, infinity, value)
    if KIND == REVERSE_KL:
        value = tl.where(only_s, infinity, value)
    s_logprob = tl.zeros([BLOCK], value.dtype)
    t_logprob = s_logprob
    if has_tokens != 0:
        s_logprob = tl.load(Row + 12 * rows + at, mask=mask, other=0.0)
        t_logprob = tl.load(Row + 13 * rows + at, mask=mask, other=0.0)
        hard = number(hard_weight, value.dtype)
        value -= tl.where(hard == 0, 0.0, hard * s_logprob)
    tl.store(Value + at, tl.where(finite, value, nan), mask=mask)
    tl.store(Finite + at, finite, mask=mask)
    if SCORES:
        forward = tl.where(only_t, infinity, _summed(Sums, at, mask, splits, rows, field, 2))
        reverse = tl.where(only_s, infinity, _summed(Sums, at, mask, splits, rows, field, 3))
        s_mode = tl.load(Row + rows + at, mask=mask, other=0.0)
        t_mode = tl.load(Row + 5 * rows + at, mask=mask, other=0.0)
        tl.store(Scores + at, tl.where(finite, forward, nan), mask=mask)
        tl.store(Scores + rows + at, tl.where(finite, reverse, nan), mask=mask)
        s_entropy = _summed(Sums, at, mask, splits, rows, field, 4)
        t_entropy = _summed(Sums, at, mask, splits, rows, field, 5)
        tl.store(Scores + 2 * rows + at, tl.where(finite, s_entropy, nan), mask=mask)
        tl.store(Scores + 3 * rows + at, tl.where(finite, t_entropy, nan), mask=mask)
        tl.store(Scores + 4 * rows + at, tl.where(finite, s_logprob, nan), mask=mask)
        tl.store(Scores + 5 * rows + at, tl.where(finite, t_logprob, nan), mask=mask)
        agreement = (s_mode == t_mode).to(value.dtype)
        tl.store(Scores + 6 * rows + at, tl.where(finite, agreement, nan), mask=mask)
        s_lost = tl.zeros([BLOCK], value.dtype)
        t_lost = s_lost
        if TAILS:
            s_lost = tl.load(Row + 14 * rows + at, mask=mask, other=0.0)
            t_lost = tl.load(Row + 15 * rows + at, mask=mask, other=0.0)
        tl.store(Scores + 7 * rows + at, tl.where(finite, s_lost, nan), mask=mask)
        tl.store(Scores + 8 * rows + at, tl.where(finite, t_lost, nan), mask=mask)


class Blocks(NamedTuple):
    """Entries that a program of the statistics and of the sweeps takes at a time, its warps, and the rows of a program where
    rows are few numbers each."""

    statistics: int
    sweep: int
    num_warps: int = 4
    rows: int = 128


def blocks_of(itemsize: int, *, heavy: bool) -> Blocks:
    """Block sizes; `heavy`: a mixture or scores, which keep more in registers. A small vocabulary takes the same, masked."""
    widest = 1024 if itemsize == 4 else 512
    return Blocks(512, widest // 2 if heavy else widest)


class Outputs(NamedTuple):
    """value [C], scores [9, C] or [0, C], finite [C] bool."""

    value: Tensor
    scores: Tensor
    finite: Tensor


class Spec(NamedTuple):
    """The numbers of a call, in the order of the op's arguments."""

    student_scale: float
    student_softcap: float | None
    teacher_scale: float
    teacher_softcap: float | None
    temperature: float
    divergence: str
    parameter: float
    hard_weight: float


def launches(
    student: Tensor,
    teacher: Tensor,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    tokens: Tensor | None,
    spec: Spec,
    grad: Tensor | None,
    scores: bool,
    *,
    grad_scale: float = 1.0,
    splits: int | None = None,
) -> tuple[list[Launch], Outputs]:
    """The launches of a chunk, and what they will have written. `grad` [C, V_s], the gradient times grad_scale, is of any
    floating dtype; it may be the student's tile."""
    rows, vocab = student.shape[0], min(student.shape[1], teacher.shape[1])
    if vocab >= MAX_VOCAB:
        raise ValueError(f"the common vocabulary must be below {MAX_VOCAB}, got {vocab}")
    kind = kind_of(spec.divergence, spec.parameter)
    blocks = blocks_of(student.itemsize, heavy=scores or kind > REVERSE_KL.value)
    splits = splits or splits_of(rows, triton.cdiv(vocab, blocks.statistics), processors(student))
    out = Outputs(
        student.new_empty(rows), student.new_empty(SCORES if scores else 0, rows), student.new_empty(rows, dtype=torch.bool)
    )
    common, general = _common(student, teacher, student_bias, teacher_bias, spec)
    # A tensor that is never read stands for tokens that are not there.
    token = {
        "Tokens": out.value.new_empty(1, dtype=torch.int64) if tokens is None else tokens.contiguous(),
        "has_tokens": int(tokens is not None),
    }
    made = {
        "Parts": student.new_empty(PARTS, splits, rows),
        "Row": student.new_empty(ROW, rows),
        "Sums": student.new_empty(SUMS, splits, rows),
        "Grad": student if grad is None else grad,
        "Value": out.value,
        "Scores": out.scores,
        "Finite": out.finite,
    }
    numbers = {
        "student_width": student.shape[1],
        "teacher_width": teacher.shape[1],
        "grad_stride": made["Grad"].stride(0),
        "parameter": min(spec.parameter, FAR.value),
        "complement": 1 - spec.parameter,
        "hard_weight": spec.hard_weight,
        "grad_scale": grad_scale,
    }
    arguments = {**common, **token, **made, **numbers, "splits": splits}
    constant = {
        "KIND": kind,
        "SCORES": scores,
        "GENERAL": general,
        "CENTRE": kind == REVERSE_KL.value and grad is not None,
        "TAILS": scores and student.shape[1] != teacher.shape[1],
    }
    return _order(arguments, constant, blocks, rows, splits, grad is not None), out


def _common(
    student: Tensor, teacher: Tensor, student_bias: Tensor | None, teacher_bias: Tensor | None, spec: Spec
) -> tuple[dict[str, Any], bool]:
    """The arguments that all kernels over the tiles share; whether a bias or a softcap is among them."""
    sides = {
        "student": (student, student_bias, spec.student_scale, spec.student_softcap),
        "teacher": (teacher, teacher_bias, spec.teacher_scale, spec.teacher_softcap),
    }
    out: dict[str, Any] = {"rows": student.shape[0], "vocab": min(student.shape[1], teacher.shape[1])}
    for name, (tile, bias, scale, softcap) in sides.items():
        out[name.capitalize()] = tile
        out[f"{name}_stride"] = tile.stride(0)
        out[f"{name.capitalize()}Bias"] = tile if bias is None else bias
        out[f"{name}_inner"] = scale / (spec.temperature if softcap is None else softcap)
        out[f"{name}_outer"] = 0.0 if softcap is None else softcap / spec.temperature
    out["biases"] = (student_bias is not None) + 2 * (teacher_bias is not None)
    return out, bool(out["biases"] or out["student_outer"] or out["teacher_outer"])


def _order(
    arguments: dict[str, Any], constant: dict[str, Any], blocks: Blocks, rows: int, splits: int, grad: bool
) -> list[Launch]:
    """Each kernel with those arguments and constants that it knows."""

    def launch(kernel: Any, **chosen: Any) -> Launch:
        over_rows = kernel in (constants, _finish)
        block = blocks.rows if over_rows else blocks.statistics if kernel is statistics else blocks.sweep
        grid = (triton.cdiv(rows, blocks.rows),) if over_rows else (rows, splits)
        given = {**arguments, "block_count": triton.cdiv(triton.cdiv(arguments["vocab"], block), splits)}
        constants_of = {**constant, **chosen, "BLOCK": block}
        scored = kernel is _sweep and constants_of["SCORES"]
        wide = scored or (kernel in (statistics, _sweep) and arguments["Student"].itemsize == 8)
        return Launch.of(kernel, grid, given, constants_of, blocks.num_warps, 255 if wide else None)

    early = grad and constant["KIND"] in (FORWARD_KL.value, REVERSE_KL.value)
    order = [launch(statistics), launch(constants), launch(_sweep, VALUE=True, GRAD=early)]
    if grad and not early:
        order.append(launch(_sweep, VALUE=False, SCORES=False, GRAD=True))
    if not early:  # one binary, whatever the gradient's dtype
        order[2].arguments.update(Grad=arguments["Student"], grad_stride=arguments["student_stride"])
    return [*order, launch(_finish)]


def divergence_rows(
    student: Tensor,
    teacher: Tensor,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    tokens: Tensor | None,
    *spec_grad_scores: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op `topd::divergence_rows`."""
    *numbers, grad, scores, grad_tile, grad_scale = spec_grad_scores
    spec, to = Spec(*numbers), student if grad_tile is None else grad_tile
    operands = (student, teacher, student_bias, teacher_bias, tokens)
    order, out = launches(*operands, spec, to if grad else None, scores, grad_scale=grad_scale)
    run_all(order)
    return tuple(out)
