"""Put responses behind prompts, and take finished rollouts apart into prompts again."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from topd.checks.rollouts import binary, check_rollouts
from topd.objectives.topk_teacher import TOPK_KEYS

# What a batch says of the responses that it holds: it goes where they are sampled anew.
OF_RESPONSES = ("response_mask", "teacher_response_mask", "verdict", "token_weights", *TOPK_KEYS)


def behind(
    prompts: Tensor, prompt_mask: Tensor, completions: Tensor, attended: Tensor, response: Tensor | None = None, side: str = ""
) -> dict[str, Tensor]:
    """Return a batch's keys for completions [B, C] behind prompts [B, P]; masks as they come, both of one dtype.

    Args:
        attended: [B, C], what of the completions is no padding.
        response: [B, C], what of it the student wrote; None: all of it.
        side: what the keys begin with.
    """
    return {
        f"{side}input_ids": torch.cat([prompts, completions], dim=1),
        f"{side}attention_mask": torch.cat([prompt_mask, attended], dim=1),
        f"{side}response_mask": torch.cat([torch.zeros_like(prompt_mask), attended if response is None else response], dim=1),
    }


def checked_masks(batch: Mapping[str, Any], side: str = "") -> tuple[Tensor, Tensor, Tensor]:
    """Return one side's ids [B, T], its attention mask and its response mask, both bool."""
    missing = [key for key in ("input_ids", "attention_mask", "response_mask") if f"{side}{key}" not in batch]
    if missing:
        raise ValueError(f"a batch must hold {side}{missing[0]}, got {sorted(batch)}")
    ids, attended = check_rollouts(batch[f"{side}input_ids"], batch[f"{side}attention_mask"], side)
    return ids, attended, binary(f"{side}response_mask", batch[f"{side}response_mask"], ids, f"{side}input_ids")


def without_responses(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the prompts of finished rollouts, of both sides where the batch has both: what a student continues anew.

    Args:
        batch: a padded batch whose responses begin in one column on each side, as `sample_rollouts` and `topd.pair` make it.

    Returns:
        input_ids and attention_mask [B, P], teacher_input_ids and teacher_attention_mask [B, P'] where there are any, and
        whatever else the batch holds that does not speak of its responses.
    """
    if "cu_seqlens" in batch:
        raise ValueError("a batch must be padded where its responses are sampled anew, got a packed one with cu_seqlens")
    prompts = {key: value for key, value in batch.items() if key not in OF_RESPONSES}
    for side in ("", "teacher_") if "teacher_response_mask" in batch else ("",):
        ids, attended, response = checked_masks(batch, side)
        column = response_column(ids, attended, response, side)
        prompts |= {f"{side}input_ids": ids[:, :column], f"{side}attention_mask": attended[:, :column]}
    return prompts


def response_column(ids: Tensor, attended: Tensor, response: Tensor, side: str = "") -> int:
    """Return the column in which the responses of all rows begin, right behind prompts that are padded on the left."""
    begun = response.any(0)
    column = int(begun.long().argmax()) if begun.any() else ids.shape[1]
    behind_prompt = attended[:, column - 1] if column else attended.new_zeros(len(ids))
    good = behind_prompt if column == ids.shape[1] else behind_prompt & (response[:, column] | ~attended[:, column:].any(-1))
    if not good.all():
        raise ValueError(
            f"{side}response_mask must begin in the same column in each row, right behind the prompt, got column {column} and "
            f"another place in row {int((~good).nonzero()[0])}; pad prompts on the left and responses on the right"
        )
    return column


def rows_of(batch: Mapping[str, Any]) -> int:
    """Return how many rows a batch has, padded or packed."""
    return len(batch["cu_seqlens"]) - 1 if "cu_seqlens" in batch else len(batch["input_ids"])


def first_responses(batch: Mapping[str, Any], kept: int) -> dict[str, Any]:
    """Return finished rollouts of which the first rows alone have a response, on both sides: the others count for nothing."""
    masks = {}
    for side in ("", "teacher_") if "teacher_response_mask" in batch else ("",):
        bounds = batch.get(f"{side}cu_seqlens")
        mask = batch[f"{side}response_mask"].clone()
        mask[kept if bounds is None else int(bounds[kept]) :] = 0
        masks[f"{side}response_mask"] = mask
    return {**batch, **masks}


def repeated(batch: Mapping[str, Any], times: int) -> dict[str, Any]:
    """Return a batch with each row `times` times in a row: tensors and lists with an entry for each row of input_ids."""
    rows = len(batch["input_ids"])

    def repeat(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() and len(value) == rows:
            return value.repeat_interleave(times, dim=0)
        return [each for each in value for _ in range(times)] if isinstance(value, list) and len(value) == rows else value

    return {key: repeat(value) for key, value in batch.items()}
