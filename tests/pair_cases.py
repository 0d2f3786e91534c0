"""Batches whose teacher reads another prompt, and their truth: full logits of each row alone, in float64."""

from collections.abc import Callable
from typing import Any

import torch
from compare import row_divergence
from tiny_models import VOCAB, tiny
from torch import Tensor

import topd
from topd.integrations.rollouts import pack_rollouts

RESPONSES = (7, 0, 4, 9)
PROMPTS, TEACHER_PROMPTS = (3, 5, 1, 4), (8, 2, 11, 4)
KEYS = ("input_ids", "attention_mask", "response_mask")
LAYOUTS = ("pair", "left", "right", "gaps", "packed", "packed gaps")
Segments = list[tuple[list[int], bool]]  # tokens one after the other, and whether they are of the response


def models() -> tuple[Any, Any]:
    """Return a student and a teacher in float64, near enough for KLs on either side of the clips of Table 13."""
    return tiny("llama", initializer_range=0.06).double(), tiny("qwen3", seed=3, initializer_range=0.06).double()


def lists(seed: int = 5) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """Return prompts, the teacher's prompts and responses of four rows; the second response is empty."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        [torch.randint(VOCAB, (n,), generator=generator).tolist() for n in lengths]
        for lengths in (PROMPTS, TEACHER_PROMPTS, RESPONSES)
    )


def side_of_segments(rows: list[Segments], where: str) -> dict[str, Tensor]:
    """Return one side of a batch, padded on the left or on the right; the padding holds tokens too."""
    width = max(sum(len(tokens) for tokens, _ in row) for row in rows)
    ids = torch.full((len(rows), width), 17)
    attended, response = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.int64)
    for b, row in enumerate(rows):
        tokens = [token for part, _ in row for token in part]
        place = slice(width - len(tokens), width) if where == "left" else slice(0, len(tokens))
        ids[b, place] = torch.tensor(tokens, dtype=torch.int64)
        attended[b, place] = 1
        response[b, place] = torch.tensor([int(counts) for part, counts in row for _ in part], dtype=torch.int64)
    return dict(zip(KEYS, (ids, attended, response), strict=True))


def batch_of(layout: str = "pair", seed: int = 5) -> dict[str, Tensor]:
    """Return the four rows in a layout. With gaps a tool's output stands in the response of the student at one place, in that
    of the teacher at another."""
    prompts, teacher_prompts, responses = lists(seed)
    if layout.startswith("packed"):
        return pack_rollouts(batch_of(layout.removeprefix("packed").strip() or "pair", seed))
    if layout == "pair":
        return topd.pair(prompts, teacher_prompts, responses, pad_token_id=0)
    tool = [40, 41, 42] if layout == "gaps" else []

    def rows(own: list[list[int]], cut: int, output: list[int]) -> list[Segments]:
        pairs = zip(own, responses, strict=True)
        return [[(a, False), (r[:cut], True), (output, False), (r[cut:], True)] for a, r in pairs]

    padding, teachers = ("left", "right") if layout == "gaps" else (layout, layout)
    student, teacher = side_of_segments(rows(prompts, 2, tool), padding), rows(teacher_prompts, 3, tool[:1])
    return student | {f"teacher_{key}": value for key, value in side_of_segments(teacher, teachers).items()}


def rows_of(batch: dict[str, Tensor], side: str) -> list[tuple[Tensor, Tensor]]:
    """Return each row's attended tokens [n], and the places of its response tokens among them."""
    if f"{side}cu_seqlens" in batch:
        sizes = batch[f"{side}cu_seqlens"].diff().tolist()
        parts = zip(*(batch[side + key].split(sizes) for key in ("input_ids", "response_mask")), strict=True)
        return [(tokens, response.nonzero()[:, 0]) for tokens, response in parts]
    rows = zip(*(batch[side + key] for key in KEYS), strict=True)
    return [(ids[mask > 0], (response[mask > 0] > 0).nonzero()[:, 0]) for ids, mask, response in rows]


def plain_losses(
    student: Any, teacher: Any, batch: dict[str, Tensor], loss_of: Callable[[Tensor, Tensor], Tensor], temperature: float = 1.0
) -> list[Tensor]:
    """Return of each row its response tokens' loss_of(log p_S, log p_T)."""
    losses = []
    for own, other in zip(rows_of(batch, ""), rows_of(batch, "teacher_"), strict=True):
        sides = [
            (model(tokens.unsqueeze(0)).logits[0] / temperature).log_softmax(-1)[places - 1]
            for model, (tokens, places) in ((student, own), (teacher, other))
        ]
        losses.append(loss_of(sides[0], sides[1].detach()))
    return losses


def loss_of(config: topd.OPDConfig) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the plain formula of a configuration, of log-probabilities [n, V]."""
    named = {"reverse_kl": topd.ReverseKL(), "forward_kl": topd.ForwardKL(), "jsd": topd.JSD()}
    divergence = named.get(config.divergence) if isinstance(config.divergence, str) else config.divergence

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        sides = student, teacher
        if config.top_k is not None:
            ids = teacher.topk(config.top_k, dim=-1).indices
            sides = tuple(each.gather(-1, ids).log_softmax(-1) for each in sides)
        value = row_divergence(divergence, *sides)
        return value if config.position_clip is None else value.clamp(max=config.position_clip)

    return loss


def reduced(losses: list[Tensor], reduction: str) -> Tensor:
    if reduction == "token":
        return torch.cat(losses).mean()
    return torch.stack([each.mean() for each in losses if each.numel()]).mean()
