"""topd::score_tokens, fully fused: hidden states and heads in, nine scores a token out; logits live in registers only.

Launches, S programs a row where rows are few:
    score_blocks  both heads read once: S groups of entries a row
    score_tail    where one vocabulary is wider, the mass of its tail
    score_finish  a row's groups to its scores

Sums and scores are float32. A head is read from memory once for all the rows that run at the same time, but touched once for
each block of rows: that is what the launches' bytes count.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from topd_kernels.score_tokens.kernels import score_blocks, score_finish, score_tail
from topd_kernels.score_tokens.records import MASSES, STATES
from topd_kernels.shared.blocks import Tile, default_tile, device_of
from topd_kernels.shared.launch import (
    PROGRAMS_PER_PROCESSOR,
    Launch,
    bytes_of,
    cdiv,
    interpreted,
    processors,
    run_all,
    splits_of,
)
from topd_kernels.shared.records import SCORES

FINISH_ROWS, FINISH_WARPS = 64, 2
MOST_SPLITS = 256


class Operands(NamedTuple):
    """One side: hidden [N, H], weight [V, H], bias [V] or None, and its numbers."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None

    @property
    def biases(self) -> int:
        """Return how many entries have a bias."""
        return 0 if self.bias is None else self.bias.shape[0]

    def contiguous(self) -> "Operands":
        """Return the side with tensors as the kernels read them."""
        bias = None if self.bias is None else self.bias.contiguous()
        return self._replace(hidden=self.hidden.contiguous(), weight=self.weight.contiguous(), bias=bias)

    def numbers(self, temperature: float) -> tuple[float, float]:
        """Return `inner` and `outer`, which the kernels multiply by: logits are outer tanh(inner product) where capped, inner
        product elsewhere."""
        divisor = temperature if self.softcap is None else self.softcap
        return float(self.scale / divisor), float(divisor / temperature)


class _Plan(NamedTuple):
    """How a run of entries is shared: blocks of rows, entries of a program, programs of a row."""

    row_blocks: int
    run: int
    splits: int

    @classmethod
    def of(cls, rows: int, entries: int, blocks: Tile, like: Tensor, splits: int | None = None) -> "_Plan":
        """Return the plan for a device; `splits` programs of a row at most, where it is given."""
        row_blocks, entry_blocks = cdiv(rows, blocks.rows), cdiv(entries, blocks.entries)
        wanted = PROGRAMS_PER_PROCESSOR * processors(like) // max(1, row_blocks)
        run = cdiv(entry_blocks, splits or splits_of(wanted, entry_blocks, MOST_SPLITS)) * blocks.entries
        return cls(row_blocks, run, cdiv(entries, run))

    def tile_bytes(self, side: Operands, entries: int, blocks: Tile) -> int:
        """Return the bytes of a side's operands that tiles over so many entries read. A tile's rows and entries past the last
        are read as the last."""
        entry_blocks, width = cdiv(entries, blocks.entries), side.hidden.shape[1]
        states, heads = blocks.rows * side.hidden.itemsize, blocks.entries * side.weight.itemsize
        biases = 0 if side.bias is None else entries * side.bias.itemsize
        return self.row_blocks * (entry_blocks * width * (states + heads) + biases)


def _blocks_launch(
    student: Operands,
    teacher: Operands,
    tokens: Tensor | None,
    temperature: float,
    state: Tensor,
    plan: _Plan,
    blocks: Tile,
    constants: dict[str, Any],
) -> Launch:
    """Return the launch over the entries that both sides have."""
    rows, vocab = student.hidden.shape[0], min(student.weight.shape[0], teacher.weight.shape[0])
    student_inner, student_outer = student.numbers(temperature)
    teacher_inner, teacher_outer = teacher.numbers(temperature)
    token_bytes = 0 if tokens is None else rows * cdiv(vocab, blocks.entries) * tokens.itemsize
    operand_bytes = sum(plan.tile_bytes(side, vocab, blocks) for side in (student, teacher))
    return Launch(
        score_blocks,
        (plan.row_blocks, plan.splits),
        {
            "StudentHidden": student.hidden,
            "StudentWeight": student.weight,
            "StudentBias": student.weight if student.bias is None else student.bias,
            "student_width": student.hidden.shape[1],
            "student_biases": student.biases,
            "student_inner": student_inner,
            "student_outer": student_outer,
            "student_capped": int(student.softcap is not None),
            "TeacherHidden": teacher.hidden,
            "TeacherWeight": teacher.weight,
            "TeacherBias": teacher.weight if teacher.bias is None else teacher.bias,
            "teacher_width": teacher.hidden.shape[1],
            "teacher_biases": teacher.biases,
            "teacher_inner": teacher_inner,
            "teacher_outer": teacher_outer,
            "teacher_capped": int(teacher.softcap is not None),
            "Tokens": state.new_empty(1, dtype=torch.int64) if tokens is None else tokens,
            "token_rows": 0 if tokens is None else rows,
            "State": state,
            "rows": rows,
            "vocab": vocab,
            "run": plan.run,
        },
        constants,
        blocks.warps,
        read_bytes=operand_bytes + token_bytes,
        written_bytes=bytes_of(state),
        flop=2 * rows * vocab * (student.hidden.shape[1] + teacher.hidden.shape[1]),
    )


def _tail_launch(
    side: Operands, vocab: int, temperature: float, plan: _Plan, blocks: Tile, masses: Tensor, constants: dict[str, Any]
) -> Launch:
    """Return the launch over the wider side's entries from vocab on."""
    (rows, width), full_vocab = side.hidden.shape, side.weight.shape[0]
    inner, outer = side.numbers(temperature)
    return Launch(
        score_tail,
        (plan.row_blocks, plan.splits),
        {
            "Hidden": side.hidden,
            "Weight": side.weight,
            "Bias": side.weight if side.bias is None else side.bias,
            "width": width,
            "biases": side.biases,
            "inner": inner,
            "outer": outer,
            "capped": int(side.softcap is not None),
            "Masses": masses,
            "rows": rows,
            "vocab": vocab,
            "full_vocab": full_vocab,
            "run": plan.run,
        },
        constants,
        blocks.warps,
        255,
        read_bytes=plan.tile_bytes(side, full_vocab - vocab, blocks),
        written_bytes=bytes_of(masses),
        flop=2 * rows * (full_vocab - vocab) * width,
    )


def _finish_launch(
    state: Tensor, student_tail: Tensor | None, teacher_tail: Tensor | None, has_tokens: bool, scores: Tensor
) -> Launch:
    """Return the launch that merges the splits of rows. A tensor that is never read stands for a tail that is not there."""
    rows = scores.shape[1]
    tails = [tail for tail in (student_tail, teacher_tail) if tail is not None]
    return Launch(
        score_finish,
        (cdiv(rows, FINISH_ROWS),),
        {
            "State": state,
            "splits": state.shape[0],
            "StudentTail": state if student_tail is None else student_tail,
            "student_tail_splits": 0 if student_tail is None else student_tail.shape[0],
            "TeacherTail": state if teacher_tail is None else teacher_tail,
            "teacher_tail_splits": 0 if teacher_tail is None else teacher_tail.shape[0],
            "token_rows": rows if has_tokens else 0,
            "Scores": scores,
            "rows": rows,
        },
        {"BLOCK": FINISH_ROWS},
        FINISH_WARPS,
        read_bytes=bytes_of(state, *tails),
        written_bytes=bytes_of(scores),
    )


def launches(
    student: Operands,
    teacher: Operands,
    tokens: Tensor | None,
    temperature: float,
    *,
    blocks: Tile | None = None,
    splits: int | None = None,
    family: str | None = None,
) -> tuple[list[Launch], Tensor]:
    """Return what computes Scores [9, N] float32, and that tensor. The tile, and how many programs at most share a row's
    vocabulary, are chosen here unless they are given. `family`: of devices, where it is not the tensors' own."""
    student, teacher = student.contiguous(), teacher.contiguous()
    (rows, student_width), teacher_width = student.hidden.shape, teacher.hidden.shape[1]
    vocab = min(student.weight.shape[0], teacher.weight.shape[0])
    aligned = student_width % 16 == teacher_width % 16 == 0
    of = device_of(student.weight.device, family).family
    blocks = blocks or default_tile(of, student.weight.itemsize, teacher.weight.itemsize, aligned=aligned)
    plan = _Plan.of(rows, vocab, blocks, student.hidden, splits)
    state = student.hidden.new_empty((plan.splits, STATES.value, rows), dtype=torch.float32)
    scores = student.hidden.new_empty((SCORES.value, rows), dtype=torch.float32)
    constants = {
        "GENERAL": any(side.bias is not None or side.softcap is not None for side in (student, teacher)),
        "WIDEN": interpreted(score_blocks),
        "BM": blocks.rows,
        "BN": blocks.entries,
        "BK": blocks.columns,
    }
    tokens = None if tokens is None else tokens.contiguous()
    order = [_blocks_launch(student, teacher, tokens, temperature, state, plan, blocks, constants)]
    tails: list[Tensor | None] = []
    for side in (student, teacher):
        if (beyond := side.weight.shape[0] - vocab) == 0:
            tails.append(None)
            continue
        plan = _Plan.of(rows, beyond, blocks, side.hidden)
        masses = side.hidden.new_empty((plan.splits, MASSES.value, rows), dtype=torch.float32)
        order.append(_tail_launch(side, vocab, temperature, plan, blocks, masses, constants))
        tails.append(masses)
    student_tail, teacher_tail = tails
    order.append(_finish_launch(state, student_tail, teacher_tail, tokens is not None, scores))
    return order, scores


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
    """Run the op `topd::score_tokens`; return scores [9, N] float32."""
    student = Operands(student_hidden, student_weight, student_bias, student_scale, student_softcap)
    teacher = Operands(teacher_hidden, teacher_weight, teacher_bias, teacher_scale, teacher_softcap)
    order, scores = launches(student, teacher, tokens, temperature)
    run_all(order)
    return scores
