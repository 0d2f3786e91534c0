"""Answers of a tiny model, all problems side by side: a loop over transformers' cache, without what `generate` does around it.

The noise of a draw depends on the generator alone: two students whose rollouts start from one seed say the same as long as they
agree, so that methods of one seed are compared on rollouts that are as alike as the students are.
"""

from typing import Any

import torch
from torch import Tensor

from quality.tasks.task import END, PAD, Task


@torch.no_grad()
def answer(model: Any, prompts: Tensor, length: int, generator: torch.Generator | None) -> Tensor:
    """Continue prompts of one length.

    Args:
        prompts: [n, P] int64.
        length: the most tokens of an answer, L.
        generator: of the noise, at temperature 1; None: the most likely token each time.

    Returns:
        [n, L] int64; padding follows after an answer's end token.
    """
    cache, tokens, columns = None, prompts, []
    running = torch.ones(len(prompts), dtype=torch.bool)
    for _ in range(length):
        output = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, scores = output.past_key_values, output.logits[:, -1]
        if generator is not None:
            scores = scores - torch.empty_like(scores).exponential_(generator=generator).clamp_min_(1e-38).log_()
        drawn = torch.where(running, scores.argmax(-1), PAD)
        running = running & (drawn != END)
        columns.append(drawn)
        tokens = drawn[:, None]
    return torch.stack(columns, dim=1)


def accuracy(model: Any, task: Task, prompts: Tensor) -> float:
    """Return the share of problems whose greedy answer is right."""
    return float(task.correct(prompts, answer(model, prompts, task.answer_length, None)).double().mean())


def rollouts(prompts: Tensor, answers: Tensor) -> dict[str, Tensor]:
    """Return the batch that an objective takes, of prompts [n, P] and answers [n, L]: an answer's padding is not attended."""
    ends = (answers == END).long()
    counted = ends.cumsum(-1) == ends
    before = torch.ones_like(prompts, dtype=torch.bool)
    return {
        "input_ids": torch.cat([prompts, answers], dim=1),
        "attention_mask": torch.cat([before, counted], dim=1),
        "response_mask": torch.cat([~before, counted], dim=1),
    }
