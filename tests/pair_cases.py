"""Batches whose teacher reads another prompt, and their truth: full logits of each row alone, in the tensors' own dtype."""

from collections.abc import Callable
from typing import Any

import torch
from tiny_models import VOCAB, tiny
from torch import Tensor

import topd

MILD = {"initializer_range": 0.2}
RESPONSES = (7, 0, 4, 9)
PROMPTS = (3, 5, 1, 4)
TEACHER_PROMPTS = (8, 2, 11, 4)
KEYS = ("input_ids", "attention_mask", "response_mask")
PackedOrPadded = dict[str, Tensor]


def models() -> tuple[Any, Any]:
    """Return a student and a teacher in float64."""
    return tiny("llama", **MILD).double(), tiny("qwen3", seed=3, **MILD).double()


def lists(seed: int = 5) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """Return prompts, the teacher's prompts and responses of four rows; one response is empty."""
    generator = torch.Generator().manual_seed(seed)

    def rows(lengths: tuple[int, ...]) -> list[list[int]]:
        return [torch.randint(VOCAB, (n,), generator=generator).tolist() for n in lengths]

    return rows(PROMPTS), rows(TEACHER_PROMPTS), rows(RESPONSES)


def batch_of(seed: int = 5) -> PackedOrPadded:
    return topd.pair(*lists(seed), pad_token_id=0)


def side_of(batch: PackedOrPadded, side: str) -> list[Tensor]:
    return [batch[side + key] for key in KEYS]


def row_logprobs(model: Any, tokens: Tensor, temperature: float) -> Tensor:
    """Return [n - 1, V] of one row's attended tokens [n]: entry t is the distribution of token t + 1."""
    return (model(tokens.unsqueeze(0)).logits[0, :-1] / temperature).log_softmax(-1)


def plain_losses(
    student: Any, teacher: Any, batch: PackedOrPadded, divergence: Callable[[Tensor, Tensor], Tensor], temperature: float = 1.0
) -> Tensor:
    """Return [B, T], each response token's divergence(log p_S, log p_T) by the student's column, 0 elsewhere."""
    ids, mask, response = side_of(batch, "")
    losses = torch.zeros(ids.shape, dtype=torch.float64)
    for row in range(ids.shape[0]):
        sides = []
        for model, (own_ids, own_mask, own_response) in (
            (student, (ids, mask, response)),
            (teacher, side_of(batch, "teacher_")),
        ):
            kept = own_mask[row].bool()
            which = own_response[row].bool()[kept].nonzero()[:, 0]
            sides.append(row_logprobs(model, own_ids[row][kept], temperature)[which - 1])
        columns = response[row].bool().nonzero()[:, 0]
        loss = divergence(sides[0], sides[1].detach())
        losses = losses.index_put((torch.full_like(columns, row), columns), loss)
    return losses
