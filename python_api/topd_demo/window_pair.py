"""One pair of windows with its transport plan, as a report shows it."""

from dataclasses import dataclass
from typing import Any

import torch

import topd

PREFIX = 24  # tokens of the prefix that are kept


@dataclass
class WindowPair:
    """Both windows at one position, as text.

    Attributes:
        prefix: the end of the text that both windows continue.
        student_tokens, teacher_tokens: their texts, one by one.
        distance: between them.
        plan: a row for each student token.
        divergent: whether it was taken for a real divergent point.
    """

    prefix: str
    student_tokens: list[str]
    teacher_tokens: list[str]
    distance: float
    plan: list[list[float]]
    divergent: bool

    def transport(self) -> topd.Transport:
        """Return the plan as `topd.plots` takes it: of one pair."""
        plan = torch.tensor([self.plan])
        return topd.Transport(torch.tensor([self.distance]), plan, torch.zeros(1))

    def heaviest(self, count: int) -> list[tuple[str, str, float]]:
        """Return the links with the most mass: student token, teacher token, share of all mass."""
        plan = torch.tensor(self.plan)
        shares, places = (plan / plan.sum()).flatten().topk(min(count, plan.numel()))
        rows, columns = places // plan.shape[1], places % plan.shape[1]
        return [
            (self.student_tokens[row], self.teacher_tokens[column], share)
            for row, column, share in zip(rows.tolist(), columns.tolist(), shares.tolist(), strict=True)
        ]


def furthest_pair(near_future: topd.NearFuture, input_ids: torch.Tensor, tokenizer: Any) -> WindowPair | None:
    """Return the two windows of a step that are furthest apart; None where there are none. input_ids [B, T]: its rollouts."""
    if not near_future.divergent.numel():
        return None
    index, windows = int(near_future.transport.distance.argmax()), near_future.windows
    row, column = windows.positions[index].tolist()

    def texts(tokens: torch.Tensor, lengths: torch.Tensor) -> list[str]:
        return [tokenizer.decode(token) for token in tokens[index, : int(lengths[index])]]

    students = texts(windows.student_tokens, windows.student_lengths)
    teachers = texts(windows.teacher_tokens, windows.teacher_lengths)
    plan = near_future.transport.plan[index, : len(students), : len(teachers)]
    prefix = tokenizer.decode(input_ids[row, max(column - PREFIX, 0) : column], skip_special_tokens=True)
    return WindowPair(
        prefix,
        students,
        teachers,
        near_future.transport.distance[index].item(),
        plan.tolist(),
        bool(near_future.divergent[index]),
    )
