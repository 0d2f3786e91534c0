"""Sorting of a short list: the smallest item is taken, what is left is said again, until nothing is left."""

import torch
from torch import Tensor

from quality.tasks.task import END, START, Task

ITEMS, ALPHABET = 5, "abcdefghijklmnopqrst"
SLOTS = {
    "take": "take pick choose grab draw pull",
    "left": "leaving left remaining rest others still",
    "finally": "sorted ordered order finally done list",
}


class Sorting(Task):
    """`q c k a m :` is answered by `take a leaving q c k m  pick c left q k m  ...  sorted a c k m q`: an item that is taken
    too early or copied wrongly is missing from all that follows."""

    name = "sorting"
    prompt_length = ITEMS + 2

    def __init__(self) -> None:
        layout = [name for left in range(ITEMS - 1, 0, -1) for name in ("take", "", "left", *[""] * left)]
        super().__init__([*ALPHABET, ":"], SLOTS, [*layout, "take", "", "finally", *[""] * (ITEMS + 1)])
        self.colon = self.first_content + len(ALPHABET)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        items = torch.rand(count, len(ALPHABET), generator=generator).argsort(-1)[:, :ITEMS] + self.first_content
        mark = items.new_ones(count, 1)
        return torch.cat([START * mark, items, self.colon * mark], dim=1)

    def contents(self, prompts: Tensor) -> Tensor:
        left = prompts[:, 1 : 1 + ITEMS]
        ordered = left.sort(-1).values
        blank = torch.zeros_like(left[:, :1])
        steps: list[Tensor] = []
        for smallest in ordered.unbind(1):
            left = left[left != smallest[:, None]].view(len(left), -1)
            steps += [blank, smallest[:, None], blank, left] if left.shape[1] else [blank, smallest[:, None]]
        return torch.cat([*steps, blank, ordered, torch.full_like(blank, END)], dim=1)

    def conclusion(self) -> slice:
        return slice(self.answer_length - ITEMS - 1, self.answer_length)
