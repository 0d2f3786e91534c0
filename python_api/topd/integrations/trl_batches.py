"""What TRL's DistillationTrainer passes on, as the batch of an objective; what topd adds to it: the teacher's own prompts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from topd.integrations.responses import behind
from topd.objectives.packed import is_packed
from topd.objectives.topk_teacher import TOPK_KEYS

TeacherTopK = Callable[[dict[str, Tensor]], tuple[Tensor, Tensor]]
TEACHER_PROMPT = "teacher_prompt"
MULTIMODAL = (
    "pixel_values",
    "image_grid_thw",
    "pixel_attention_mask",
    "spatial_shapes",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)


def to_batch(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Turn TRL's prompts and completions into the batch of an objective; what tools wrote is attended but no response. Finished
    rollouts are taken as they are."""
    if "response_mask" in inputs:
        return {key: value for key, value in inputs.items() if key != "num_items_in_batch"}
    images = [key for key in MULTIMODAL if inputs.get(key) is not None]
    if images:
        raise ValueError(f"inputs must be text alone, got {images[0]}; topd's objectives read no images")
    response = inputs["completion_mask"] * inputs["tool_mask"] if "tool_mask" in inputs else inputs["completion_mask"]
    completions = inputs["completion_ids"], inputs["completion_mask"], response
    batch = behind(inputs["prompt_ids"], inputs["prompt_mask"], *completions)
    if "teacher_prompt_ids" in inputs:
        batch |= behind(inputs["teacher_prompt_ids"], inputs["teacher_prompt_mask"], *completions, side="teacher_")
    return batch


def teacher_prompts_of(rows: Sequence[Mapping[str, Any]]) -> list[Any] | None:
    """Return the column teacher_prompt of a dataset's rows; None where there is none."""
    if not any(TEACHER_PROMPT in row for row in rows):
        return None
    prompts = [row.get(TEACHER_PROMPT) for row in rows]
    for row, prompt in enumerate(prompts):
        if not isinstance(prompt, str | list) or not prompt:
            raise ValueError(
                f"teacher_prompt must be text or a list of messages in each row, got {prompt!r} in row {row} of a batch; give "
                "one to every row, or remove the column"
            )
    return prompts


def has_teacher_prompts(dataset: Any) -> bool | None:
    """Return whether a dataset has a column teacher_prompt; None where it does not name its columns."""
    columns = getattr(dataset, "column_names", None)
    return TEACHER_PROMPT in columns if isinstance(columns, list | tuple) else None


def tokenized(tokenizer: Any, prompts: Sequence[Any], **template: Any) -> list[list[int]]:
    """Return the ids of prompts, text as it is, messages through the chat template, as TRL tokenizes the student's.

    Args:
        template: further words for `apply_chat_template`.
    """
    options: dict[str, Any] = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, **template}

    def ids(prompt: Any) -> list[int]:
        whole = tokenizer(text=prompt) if isinstance(prompt, str) else tokenizer.apply_chat_template(prompt, **options)
        return list(whole["input_ids"])

    return [ids(prompt) for prompt in prompts]


def finished_rollouts(batch: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    """Check the batch that a data_collator made, and return it on the device. TRL splits it by its rows."""
    other = [key for key, value in batch.items() if not isinstance(value, Tensor)]
    if "response_mask" not in batch or is_packed(batch) or other:
        came = f"{other[0]}, which is no tensor" if other else sorted(batch)
        raise ValueError(
            "data_collator must make finished rollouts, padded: tensors input_ids, attention_mask and response_mask, for "
            f"instance by topd.pair, got {came}; without data_collator TRL samples the responses to the column prompt"
        )
    return {key: value.to(device) for key, value in batch.items()}


def asked_topk(teacher_topk: TeacherTopK, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Ask the user's function for the batch keys of a top-k teacher, on the batch's device; OPD checks the tensors."""
    answer = teacher_topk(dict(batch))
    if not isinstance(answer, tuple) or len(answer) != 2 or not all(isinstance(each, Tensor) for each in answer):
        raise TypeError(
            f"teacher_topk must return (logprobs, ids), two tensors, got {type(answer).__name__}; topd.pad_topk makes them "
            "from a server's answers"
        )
    return {key: value.to(batch["input_ids"].device) for key, value in zip(TOPK_KEYS, answer, strict=True)}
