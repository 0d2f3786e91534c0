"""A chunk of divergence_rows: what its launches share, and each launch with its kernel's parameters by name."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from topd_kernels.divergence_rows.constants import constants
from topd_kernels.divergence_rows.finish import finish
from topd_kernels.divergence_rows.kernels import sweep
from topd_kernels.divergence_rows.statistics import statistics
from topd_kernels.divergence_rows.terms import FORWARD_KL, REVERSE_KL
from topd_kernels.shared.launch import Launch, bytes_of, cdiv, logit_numbers
from topd_kernels.shared.row_math import FAR


class Blocks(NamedTuple):
    """Entries that a program of the statistics and of the sweeps takes at a time, their warps, and the rows of a program where
    rows are few numbers each. A program of the statistics has one warp: it often needs a number of all its lanes."""

    statistics: int
    sweep: int
    statistics_warps: int = 1
    sweep_warps: int = 4
    rows: int = 128
    row_warps: int = 4


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


@dataclass
class Chunk:
    """What the launches of a chunk share: the tensors, the numbers, the records between the kernels, how it is cut."""

    student_product: Tensor
    teacher_product: Tensor
    student_bias: Tensor | None
    teacher_bias: Tensor | None
    tokens: Tensor | None
    spec: Spec
    scores: bool
    outputs: Outputs
    parts: Tensor
    row: Tensor
    sums: Tensor
    kind: int
    vocab: int
    blocks: Blocks
    splits: int

    rows: int = field(init=False)
    general: bool = field(init=False)  # whether there is a bias or a softcap: the kernels' constant GENERAL
    tails: bool = field(init=False)  # whether one side's vocabulary goes on beyond the common one, and its mass is asked for
    registers: int | None = field(init=False)  # what a thread that reads float64 tiles, or rows that are not aligned, may have
    tiles: dict[str, Any] = field(init=False)  # the arguments of the kernels that read logits
    token_arguments: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        spec, student_product, teacher_product = self.spec, self.student_product, self.teacher_product
        softcapped = bool(spec.student_softcap or spec.teacher_softcap)
        student_inner, student_outer = logit_numbers(spec.student_scale, spec.student_softcap, spec.temperature)
        teacher_inner, teacher_outer = logit_numbers(spec.teacher_scale, spec.teacher_softcap, spec.temperature)
        self.rows = student_product.shape[0]
        self.general = softcapped or self.student_bias is not None or self.teacher_bias is not None
        self.tails = self.scores and student_product.shape[1] != teacher_product.shape[1]
        aligned = student_product.stride(0) % 16 == teacher_product.stride(0) % 16 == 0
        self.registers = None if student_product.itemsize == 4 and aligned else 255
        self.tiles = {
            "Student": student_product,
            "student_stride": student_product.stride(0),
            "StudentBias": student_product if self.student_bias is None else self.student_bias,
            "student_biased": int(self.student_bias is not None),
            "student_inner": student_inner,
            "student_outer": student_outer,
            "Teacher": teacher_product,
            "teacher_stride": teacher_product.stride(0),
            "TeacherBias": teacher_product if self.teacher_bias is None else self.teacher_bias,
            "teacher_biased": int(self.teacher_bias is not None),
            "teacher_inner": teacher_inner,
            "teacher_outer": teacher_outer,
            "rows": self.rows,
            "vocab": self.vocab,
        }
        # A tensor that is never read stands for tokens that are not there.
        tokens = self.outputs.value.new_empty(1, dtype=torch.int64) if self.tokens is None else self.tokens
        self.token_arguments = {"Tokens": tokens, "has_tokens": int(self.tokens is not None)}

    def block_count(self, block: int) -> int:
        """Return the blocks of a part of a row."""
        return cdiv(cdiv(self.vocab, block), self.splits)

    def entry_bytes(self, *, student: int, teacher: int) -> int:
        """Return the bytes of a row that so many entries of each side are read from, biases included."""
        student_bytes = self.student_product.itemsize + (0 if self.student_bias is None else self.student_bias.itemsize)
        teacher_bytes = self.teacher_product.itemsize + (0 if self.teacher_bias is None else self.teacher_bias.itemsize)
        return student * student_bytes + teacher * teacher_bytes

    def statistics(self, *, centre: bool) -> Launch:
        """Return the launch that writes the parts; `centre`: the reverse KL's too."""
        student_width, teacher_width = self.student_product.shape[1], self.teacher_product.shape[1]
        read = self.entry_bytes(
            student=student_width if self.tails else self.vocab, teacher=teacher_width if self.tails else self.vocab
        )
        fields = self.splits * (9 + 2 * centre) + 4 * self.tails
        return Launch(
            statistics,
            (self.rows, self.splits),
            {
                **self.tiles,
                "Parts": self.parts,
                "block_count": self.block_count(self.blocks.statistics),
                "student_width": student_width,
                "teacher_width": teacher_width,
            },
            {
                "CENTRE": centre,
                "TAILS": self.tails,
                "GENERAL": self.general,
                "BLOCK": self.blocks.statistics,
            },
            self.blocks.statistics_warps,
            self.registers,
            read_bytes=self.rows * read,
            written_bytes=self.rows * fields * self.parts.itemsize,
        )

    def constants(self) -> Launch:
        """Return the launch that makes each row's parts one record."""
        has_tokens = self.tokens is not None
        read = (13 * self.splits + 4 * self.tails) * self.parts.itemsize
        if self.tokens is not None:
            read += self.tokens.itemsize + self.entry_bytes(student=1, teacher=1)
        fields = 12 + 2 * has_tokens + 2 * self.tails
        return Launch(
            constants,
            (cdiv(self.rows, self.blocks.rows),),
            {**self.tiles, **self.token_arguments, "Parts": self.parts, "Row": self.row, "splits": self.splits},
            {"TAILS": self.tails, "GENERAL": self.general, "BLOCK": self.blocks.rows},
            self.blocks.row_warps,
            read_bytes=self.rows * read,
            written_bytes=self.rows * fields * self.row.itemsize,
        )

    def sweep(self, grad_tile: Tensor | None, grad_scale: float, *, value: bool) -> Launch:
        """Return the launch that writes the sums, where `value` asks for them, and the gradient, where a tile is given."""
        scores, student_width = self.scores and value, self.student_product.shape[1]
        # Without a gradient one binary, whatever the gradient's dtype.
        grad = self.student_product if grad_tile is None else grad_tile
        fields = 1 + (self.kind not in (FORWARD_KL.value, REVERSE_KL.value)) + 4 * scores if value else 0
        written = fields * self.splits * self.sums.itemsize
        return Launch(
            sweep,
            (self.rows, self.splits),
            {
                **self.tiles,
                **self.token_arguments,
                "Row": self.row,
                "Sums": self.sums,
                "Grad": grad,
                "grad_stride": grad.stride(0),
                "splits": self.splits,
                "block_count": self.block_count(self.blocks.sweep),
                "student_width": student_width,
                "parameter": min(self.spec.parameter, FAR.value),
                "complement": 1 - self.spec.parameter,
                "hard_weight": self.spec.hard_weight,
                "grad_scale": grad_scale,
            },
            {
                "KIND": self.kind,
                "VALUE": value,
                "SCORES": scores,
                "GRAD": grad_tile is not None,
                "GENERAL": self.general,
                "BLOCK": self.blocks.sweep,
            },
            self.blocks.sweep_warps,
            255 if scores or self.general else self.registers,
            read_bytes=self.rows * self._sweep_reads(grad=grad_tile is not None),
            written_bytes=self.rows * (written + (0 if grad_tile is None else student_width * grad.itemsize)),
        )

    def _sweep_reads(self, *, grad: bool) -> int:
        """Return the bytes of a row that a sweep reads."""
        numbers, read = 7, 0
        if self.kind >= REVERSE_KL.value:
            numbers, read = numbers + 1, self.entry_bytes(student=0, teacher=1)
        if grad:
            numbers += {FORWARD_KL.value: 0, REVERSE_KL.value: 2}.get(self.kind, self.splits)
            if self.tokens is not None:
                numbers, read = numbers + 1, read + self.tokens.itemsize
        return self.splits * (numbers * self.row.itemsize + read) + self.entry_bytes(student=self.vocab, teacher=self.vocab)

    def finish(self) -> Launch:
        """Return the launch that writes the outputs."""
        has_tokens, out = self.tokens is not None, self.outputs
        fields = 3 + self.splits + 2 * has_tokens + self.scores * (2 + 4 * self.splits) + 2 * self.tails
        return Launch(
            finish,
            (cdiv(self.rows, self.blocks.rows),),
            {
                "Row": self.row,
                "Sums": self.sums,
                "Value": out.value,
                "Scores": out.scores,
                "Finite": out.finite,
                "rows": self.rows,
                "splits": self.splits,
                "has_tokens": int(has_tokens),
                "hard_weight": self.spec.hard_weight,
            },
            {"KIND": self.kind, "SCORES": self.scores, "TAILS": self.tails, "BLOCK": self.blocks.rows},
            self.blocks.row_warps,
            read_bytes=self.rows * fields * self.row.itemsize,
            written_bytes=bytes_of(*out),
        )
