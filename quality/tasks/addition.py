"""Addition of two numbers, a digit at a time from the last one on, then the sum."""

import torch
from torch import Tensor

from quality.tasks.task import END, START, Task

DIGITS = 4
SLOTS = {
    "link": "so then now next here thus",
    "gives": "makes is gives yields equals totals",
    "finally": "sum answer result total outcome altogether",
}


class Addition(Task):
    """`4 7 1 9 + 8 5 6 3 =` is answered by `so 9 3 makes 2 1  then 1 6 is 8 0  ...  sum 1 3 2 8 2`: of each place the two
    digits, the digit of the sum and the carry, whose errors go on into the next place."""

    name = "addition"
    prompt_length = 2 * DIGITS + 3

    def __init__(self) -> None:
        place = ["link", "", "", "gives", "", ""]
        super().__init__([*"0123456789", "+", "="], SLOTS, [*(place * DIGITS), "finally", *[""] * (DIGITS + 2)])
        self.plus, self.equals = self.first_content + 10, self.first_content + 11

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        digits = torch.randint(10, (count, 2 * DIGITS), generator=generator) + self.first_content
        left, right = digits.chunk(2, dim=1)
        mark = digits.new_ones(count, 1)
        return torch.cat([START * mark, left, self.plus * mark, right, self.equals * mark], dim=1)

    def contents(self, prompts: Tensor) -> Tensor:
        left = prompts[:, 1 : 1 + DIGITS].flip(1) - self.first_content
        right = prompts[:, 2 + DIGITS : 2 + 2 * DIGITS].flip(1) - self.first_content
        carry, blank = torch.zeros_like(left[:, 0]), torch.zeros_like(left[:, 0])
        steps: list[Tensor] = []
        sums: list[Tensor] = []
        for a, b in zip(left.unbind(1), right.unbind(1), strict=True):
            total = a + b + carry
            digit, carry = total % 10, total // 10
            steps += [blank, a, b, blank, digit, carry]
            sums.append(digit)
        digits = torch.stack([*steps, blank, carry, *reversed(sums)], dim=1) + self.first_content
        return torch.cat([digits, torch.full_like(digits[:, :1], END)], dim=1)

    def conclusion(self) -> slice:
        return slice(self.answer_length - DIGITS - 2, self.answer_length)
