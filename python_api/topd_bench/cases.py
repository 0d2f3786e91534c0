"""Named shapes after real models, and random inputs of those shapes.

Each case declares the flop of its matrix products, the floor that every time is compared with: 2 N H V for one product;
a trainable head needs student and teacher forward, d hidden and d weight; a frozen head does without d weight, a loss without a
teacher without its forward.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

LOGIT_SPREAD = 2.0
TEACHER_NOISE = 0.3


@dataclass(frozen=True)
class Case:
    """One shape: N tokens, a common vocabulary V, hidden widths H_s and H_t; workspace_bytes None is topd's default."""

    name: str
    n: int
    vocab: int
    student_width: int
    teacher_width: int
    workspace_bytes: int | None = None

    def gemm_count(self, *, trainable_head: bool, teacher: bool = True) -> int:
        """Return how many matrix products the floor has, with a teacher or without."""
        return (3 if trainable_head else 2) + teacher

    def gemm_flop(self, *, trainable_head: bool, teacher: bool = True) -> int:
        """Return the flop of the floor's matrix products."""
        products = self.gemm_count(trainable_head=trainable_head, teacher=False)
        return 2 * self.n * self.vocab * (products * self.student_width + teacher * self.teacher_width)

    def least_bytes(self, *, trainable_head: bool, teacher: bool = True, itemsize: int = 4) -> int:
        """Return the bytes that any program moves: it reads hidden states and weights once and writes each gradient once."""
        student = self.n * self.student_width, self.vocab * self.student_width
        read = sum(student) + teacher * (self.n + self.vocab) * self.teacher_width
        return itemsize * (read + student[0] + trainable_head * student[1])


CASES = {
    case.name: case
    for case in (
        Case("tiny", n=64, vocab=1003, student_width=48, teacher_width=64),
        Case("smollm2_4", n=4, vocab=49152, student_width=576, teacher_width=576),
        Case("smollm2_32", n=32, vocab=49152, student_width=576, teacher_width=576),
        Case("small", n=256, vocab=49152, student_width=576, teacher_width=576),
        Case("smollm2", n=1024, vocab=49152, student_width=576, teacher_width=576),
        Case("qwen", n=512, vocab=151936, student_width=896, teacher_width=1024, workspace_bytes=1 << 30),
    )
}

# Hidden widths and vocabularies of the models' configurations, for GPUs.
GPU_CASES = {
    case.name: case
    for case in (
        Case("qwen3-8b from qwen3-14b", n=8192, vocab=151_936, student_width=4096, teacher_width=5120),
        Case("qwen3-4b from qwen3-30b-a3b", n=8192, vocab=151_936, student_width=2560, teacher_width=2048),
        Case("llama-3.2-1b from llama-3.1-8b", n=8192, vocab=128_256, student_width=2048, teacher_width=4096),
        Case("gemma-3-4b from gemma-3-27b", n=8192, vocab=262_208, student_width=2560, teacher_width=5376),
    )
}


@dataclass(frozen=True, eq=False)
class Inputs:
    """Hidden states [N, H] and head weights [V, H] of both sides, of one dtype; what is differentiated requires grad."""

    student_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    workspace_bytes: int | None

    def to(self, dtype: torch.dtype) -> "Inputs":
        """Return the same numbers in another dtype, rounded where it has fewer digits."""
        tensors = (self.student_hidden, self.student_weight, self.teacher_hidden, self.teacher_weight)
        student_hidden, student_weight, teacher_hidden, teacher_weight = (
            each.detach().to(dtype).requires_grad_(each.requires_grad) for each in tensors
        )
        return Inputs(student_hidden, student_weight, teacher_hidden, teacher_weight, self.workspace_bytes)

    @property
    def device(self) -> torch.device:
        return self.student_hidden.device

    @property
    def rows(self) -> int:
        return self.student_hidden.shape[0]

    @property
    def trainable_head(self) -> bool:
        return self.student_weight.requires_grad

    @property
    def differentiated(self) -> tuple[Tensor, ...]:
        """Return what gradients are asked for: hidden states, and the weight of a trainable head."""
        return (self.student_hidden, self.student_weight) if self.trainable_head else (self.student_hidden,)


def make_inputs(
    case: Case,
    *,
    trainable_head: bool,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Inputs:
    """Make random inputs: peaked softmaxes (logits of standard deviation 2) and a teacher near the student.

    Everything is written in place: no temporary of the inputs' size ever exists, as the memory benchmark wants it.
    """
    generator = torch.Generator(device).manual_seed(seed)
    scale = LOGIT_SPREAD / case.student_width**0.5

    def normal(rows: int, width: int, deviation: float) -> Tensor:
        return torch.empty(rows, width, dtype=dtype, device=device).normal_(0.0, deviation, generator=generator)

    def near(student: Tensor, width: int, deviation: float) -> Tensor:
        """Return noise [rows, width] with the student's columns added, as far as both are wide."""
        shared, teacher = min(width, student.shape[1]), normal(student.shape[0], width, TEACHER_NOISE * deviation)
        teacher[:, :shared].add_(student[:, :shared])
        return teacher

    hidden, weight = normal(case.n, case.student_width, 1.0), normal(case.vocab, case.student_width, scale)
    teacher = near(hidden, case.teacher_width, 1.0), near(weight, case.teacher_width, scale)
    return Inputs(hidden.requires_grad_(), weight.requires_grad_(trainable_head), *teacher, case.workspace_bytes)


def zipf_ids(rows: int, vocab: int, count: int, generator: torch.Generator) -> Tensor:
    """Return ids [rows, count] int64 as text has them, on the generator's device: id k with a probability near 1 / (k + 1), so
    that of a vocabulary of 151,936 the first stands in every 17th place. Repeats within a row happen."""
    where = torch.rand(rows, count, generator=generator, device=generator.device, dtype=torch.float64)
    return ((vocab + 1.0) ** where).long().clamp_(1, vocab) - 1
