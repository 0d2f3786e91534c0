"""What a step costs in floating-point operations: counted from shapes, the same on every machine.

A token's forward is two operations for each weight of a matrix that it meets, and four for each column that it attends to, for
each unit of width and layer. A backward costs two forwards. Rollouts and windows are forwards of a token at a time. Left out:
norms, softmax, the optimizer, the transport and the measurement of the accuracy.
"""

from dataclasses import dataclass
from typing import Any

import topd
from quality.methods import Row

BACKWARD = 2


@dataclass(frozen=True)
class Cost:
    """Operations of a model's forward.

    Attributes:
        body: for a token, without attention to other columns and without the head.
        head: for a token's logits.
        attended: for a token and each column that it attends to.
    """

    body: int
    head: int
    attended: int

    @classmethod
    def of(cls, model: Any) -> "Cost":
        """Count a Llama of transformers with as many key heads as query heads."""
        config = model.config
        width, layers = config.hidden_size, config.num_hidden_layers
        matrices = layers * (4 * width * width + 3 * width * config.intermediate_size)
        return cls(2 * matrices, 2 * width * config.vocab_size, 4 * layers * width)

    def forward(self, tokens: float, columns: float) -> float:
        """Return the operations of so many tokens, each attending to so many columns on average."""
        return tokens * (self.body + self.head + self.attended * columns)


def step_flop(row: Row, student: Cost, teacher: Cost, prompt: int, answers: list[int], objective: topd.Objective) -> float:
    """Return the operations of one step.

    Args:
        prompt: tokens of a prompt.
        answers: tokens of each answer.
        objective: what the row's objective returned, for the windows.
    """
    total = 0.0
    for length in answers:
        whole = prompt + length
        total += (2 + BACKWARD) * student.forward(whole, whole / 2) + teacher.forward(whole, whole / 2)
    near, config = objective.near_future, row.near_future
    if near is None or config is None:
        return total
    windows = near.windows
    column = windows.positions[:, 1].double()
    own, others = windows.student_lengths.double(), windows.teacher_lengths.double()

    def drawn(cost: Cost, lengths: Any) -> float:
        return float(sum(cost.forward(n, c) for n, c in zip(lengths.tolist(), (column + lengths / 2).tolist(), strict=True)))

    total += drawn(teacher, others)
    if config.student_window == "regenerate":
        total += drawn(student, own)
    elif config.window_noise == "counterfactual":
        total += float(own.sum()) * student.head
    if config.guidance_weight:
        guided = own[near.divergent]
        if config.student_window == "regenerate":
            spans = zip(guided.tolist(), (column[near.divergent] + guided / 2).tolist(), strict=True)
            total += (1 + BACKWARD) * float(sum(student.forward(n, c) for n, c in spans))
        else:
            total += (1 + BACKWARD) * float(guided.sum()) * student.head
    return total
