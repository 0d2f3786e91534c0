"""The kernels of score_tokens: logits live in registers only.

A program takes BM rows and a run of vocabulary blocks. For each block it forms both sides' [BM, BN] logits (two `tl.dot` loops
over the hidden widths), makes them one group and merges it into the group so far (chain_rule.py): one pass over both heads, two
matrix products in all, exact between near-equal sides. The runs of a row ("splits") are merged by the last kernel in the same
way. Where one vocabulary is wider, the mass of its tail is summed with that side's product alone.
"""

import triton
import triton.language as tl

from topd_kernels.score_tokens.chain_rule import (
    empty_group,
    group_of,
    load_group,
    log_mass_step,
    merge,
    merge_masses,
    side_of,
    store_group,
)
from topd_kernels.score_tokens.records import (
    MASS_REST,
    MASS_TOP,
    MASSES,
    STATE_STUDENT_TOKEN,
    STATE_TEACHER_TOKEN,
    STATES,
)
from topd_kernels.shared.records import (
    SCORE_FORWARD_KL,
    SCORE_REVERSE_KL,
    SCORE_STUDENT_ENTROPY,
    SCORE_STUDENT_LOGPROB,
    SCORE_STUDENT_LOST_MASS,
    SCORE_TEACHER_ENTROPY,
    SCORE_TEACHER_LOGPROB,
    SCORE_TEACHER_LOST_MASS,
    SCORE_TOP1_AGREEMENT,
)
from topd_kernels.shared.row_math import FLOOR, log1p, tanh


@triton.jit
def _product(Hidden, Weight, row, entry, width, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WIDEN: tl.constexpr):
    """Return hidden weightᵀ [BM, BN] of rows and entries that all exist, near enough to the pointers for 32-bit offsets. WIDEN:
    the interpreter's dot does not know bfloat16."""
    k = tl.arange(0, BK)
    hidden_offsets = row[:, None] * width + k[None, :]
    weight_offsets = entry[None, :] * width + k[:, None]
    product = tl.zeros((BM, BN), tl.float32)
    for start in tl.range(0, width, BK):
        inside = k < width - start
        h = tl.load(Hidden + start + hidden_offsets, mask=inside[None, :], other=0.0)
        w = tl.load(Weight + start + weight_offsets, mask=inside[:, None], other=0.0)
        if WIDEN:
            h = h.to(tl.float32)
            w = w.to(tl.float32)
        product = tl.dot(h, w, product, input_precision="ieee")
    return product


@triton.jit
def _logits(product, Bias, entries, mask, biases, inner, outer, capped, GENERAL: tl.constexpr):
    """Return logits as row_math.logits_of does, with FLOOR for -inf; NaN stays. `biases`: how many entries have one."""
    y = product
    if GENERAL:
        y += tl.load(Bias + entries, mask=mask & (entries < biases), other=0.0)
    y *= inner
    if GENERAL:
        if capped != 0:
            y = outer * tanh(y)
    y = tl.where(y < FLOOR, FLOOR, y)
    return tl.where(mask, y, FLOOR)


# `biases` are 0 where a side has none, `token_rows` where there are no tokens, and flags are ints: before Triton 3.9 its
# interpreter takes no bool.
@triton.jit(
    do_not_specialize=[
        "rows",
        "vocab",
        "run",
        "student_biases",
        "student_capped",
        "teacher_biases",
        "teacher_capped",
        "token_rows",
    ],
    do_not_specialize_on_alignment=["Tokens"],
)
def score_blocks(
    StudentHidden, StudentWeight, StudentBias, student_width, student_biases, student_inner, student_outer, student_capped,
    TeacherHidden, TeacherWeight, TeacherBias, teacher_width, teacher_biases, teacher_inner, teacher_outer, teacher_capped,
    Tokens, token_rows, State, rows, vocab, run,
    GENERAL: tl.constexpr, WIDEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Make entries [split * run, (split + 1) * run) of both sides one group; write it and the token's logits into State."""
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
        entries = entry[None, :]
        s = _product(StudentHidden, StudentWeight, local_row, held, student_width, BM, BN, BK, WIDEN)
        s = _logits(s, StudentBias, entries, mask, student_biases, student_inner, student_outer, student_capped, GENERAL)
        student = side_of(s, entry)
        t = _product(TeacherHidden, TeacherWeight, local_row, held, teacher_width, BM, BN, BK, WIDEN)
        t = _logits(t, TeacherBias, entries, mask, teacher_biases, teacher_inner, teacher_outer, teacher_capped, GENERAL)
        teacher = side_of(t, entry)
        StudentWeight += BN * student_width
        TeacherWeight += BN * teacher_width
        token = tl.load(Tokens + row, mask=row < token_rows, other=-1)
        here = (token >= start) & (token < start + BN)
        if tl.max(here.to(tl.int32), 0) > 0:
            is_token = entries == token[:, None]
            s_token = tl.where(here, tl.max(tl.where(is_token, s, FLOOR), 1), s_token)
            t_token = tl.where(here, tl.max(tl.where(is_token, t, FLOOR), 1), t_token)
        block = group_of(s, t, student, teacher)
        # A branch, though merging with an empty group would do: the compiler then keeps the merge's work apart from the tile's.
        if start == first:
            group = block
        else:
            group = merge(group, block)
    State += tl.program_id(1).to(tl.int64) * STATES * rows
    State += row
    store_group(State, group, rows, row < rows)
    tl.store(State + STATE_STUDENT_TOKEN * rows, s_token, mask=row < rows)
    tl.store(State + STATE_TEACHER_TOKEN * rows, t_token, mask=row < rows)


@triton.jit(do_not_specialize=["rows", "vocab", "full_vocab", "run", "biases", "capped"])
def score_tail(
    Hidden, Weight, Bias, width, biases, inner, outer, capped, Masses, rows, vocab, full_vocab, run,
    GENERAL: tl.constexpr, WIDEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write the mass of a run of the entries [vocab, full_vocab) of the wider side into Masses."""
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
        y = _logits(y, Bias, entry[None, :], mask, biases, inner, outer, capped, GENERAL)
        block_top = tl.max(y, 1)
        block_rest = tl.sum(tl.exp(y - block_top[:, None]), 1) - 1
        top, rest, _ = merge_masses(top, rest, block_top, block_rest)
    row = first_row + tl.arange(0, BM)
    inside = row < rows
    Masses += tl.program_id(1).to(tl.int64) * MASSES * rows + row
    tl.store(Masses + MASS_TOP * rows, top, mask=inside)
    tl.store(Masses + MASS_REST * rows, rest, mask=inside)


@triton.jit
def _logprob_of(side, token):
    """Return log p of a token's logit; -inf for a token without probability or outside the vocabulary."""
    return tl.where(token <= FLOOR, float("-inf"), (token - side.top) - log1p(side.rest))


@triton.jit
def _lost_mass(side, Masses, splits, rows, row, inside):
    """Return the probability of the tail in the side's full distribution; 0 without splits."""
    top = tl.full(side.top.shape, FLOOR, tl.float32)
    rest = tl.zeros(side.top.shape, tl.float32)
    Masses += row
    for _ in tl.range(0, splits):
        tail_top = tl.load(Masses + MASS_TOP * rows, mask=inside, other=FLOOR)
        tail_rest = tl.load(Masses + MASS_REST * rows, mask=inside, other=0.0)
        top, rest, _higher = merge_masses(top, rest, tail_top, tail_rest)
        Masses += MASSES * rows
    share = 1 / (1 + tl.exp(-log_mass_step(side.top, side.rest, top, rest)))
    return tl.where(top == float("inf"), 1.0, share)


@triton.jit
def _store_score(Scores, FIELD: tl.constexpr, rows, row, value, exists, inside):
    """Write a score of rows; NaN for a row without distributions."""
    tl.store(Scores + FIELD * rows + row, tl.where(exists, value, float("nan")), mask=inside)


@triton.jit(do_not_specialize=["rows", "splits", "student_tail_splits", "teacher_tail_splits", "token_rows"])
def score_finish(
    State, splits, StudentTail, student_tail_splits, TeacherTail, teacher_tail_splits, token_rows, Scores, rows,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Merge the splits of rows, in order; write their scores."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    s_token = tl.full((BLOCK,), FLOOR, tl.float32)
    t_token = s_token
    group = empty_group(BLOCK)
    State += row
    for _ in tl.range(0, splits):
        group = merge(group, load_group(State, rows, inside))
        s_token = tl.maximum(s_token, tl.load(State + STATE_STUDENT_TOKEN * rows, mask=inside, other=FLOOR))
        t_token = tl.maximum(t_token, tl.load(State + STATE_TEACHER_TOKEN * rows, mask=inside, other=FLOOR))
        State += STATES * rows
    s = group.student
    t = group.teacher
    exists = (s.top > FLOOR) & (t.top > FLOOR) & (s.top < float("inf")) & (t.top < float("inf"))
    exists = exists & (s.rest < float("inf")) & (t.rest < float("inf"))
    zero = tl.zeros((BLOCK,), tl.float32)
    s_logprob = tl.where(row < token_rows, _logprob_of(s, s_token), zero)
    t_logprob = tl.where(row < token_rows, _logprob_of(t, t_token), zero)
    s_lost = _lost_mass(s, StudentTail, student_tail_splits, rows, row, inside)
    t_lost = _lost_mass(t, TeacherTail, teacher_tail_splits, rows, row, inside)
    _store_score(Scores, SCORE_FORWARD_KL, rows, row, group.forward, exists, inside)
    _store_score(Scores, SCORE_REVERSE_KL, rows, row, group.reverse, exists, inside)
    _store_score(Scores, SCORE_STUDENT_ENTROPY, rows, row, s.entropy, exists, inside)
    _store_score(Scores, SCORE_TEACHER_ENTROPY, rows, row, t.entropy, exists, inside)
    _store_score(Scores, SCORE_STUDENT_LOGPROB, rows, row, s_logprob, exists, inside)
    _store_score(Scores, SCORE_TEACHER_LOGPROB, rows, row, t_logprob, exists, inside)
    _store_score(Scores, SCORE_TOP1_AGREEMENT, rows, row, tl.where(s.mode == t.mode, zero + 1, zero), exists, inside)
    _store_score(Scores, SCORE_STUDENT_LOST_MASS, rows, row, s_lost, exists, inside)
    _store_score(Scores, SCORE_TEACHER_LOST_MASS, rows, row, t_lost, exists, inside)
