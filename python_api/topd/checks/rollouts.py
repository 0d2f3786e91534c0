"""Rollouts and positions as the public functions take them, checked."""

from typing import Any

import torch
from torch import Tensor

from topd.checks.values import LARGEST_INT, on_device, shaped, tensor
from topd.losses.operands import typed


def check_differentiable(name: str, model: Any) -> None:
    """Refuse a model that was loaded under torch.inference_mode where gradients go through it."""
    if not torch.is_grad_enabled():
        return
    bad = next((parameter for parameter, value in model.named_parameters() if value.is_inference()), None)
    if bad is not None:
        raise ValueError(
            f"{name} must be loaded outside torch.inference_mode() to be trained, got an inference tensor as {bad}; load it "
            "outside (a teacher may be loaded under it)"
        )


def binary(name: str, value: object, like: Tensor, like_name: str) -> Tensor:
    """A [B, T] mask of bools or of the integers 0 and 1, as bool."""
    checked = tensor(name, value)
    if checked.dtype.is_floating_point or checked.dtype.is_complex:
        raise TypeError(f"{name} must be bool or integers 0 and 1, got {checked.dtype}; compare it, mask > 0.5, to make one")
    shaped(name, checked, tuple(like.shape), f"the shape of {like_name}")
    on_device(name, checked, like.device, like_name)
    if checked.dtype == torch.bool:
        return checked
    if checked.device.type == "cpu" and ((checked != 0) & (checked != 1)).any():
        bad = checked[(checked != 0) & (checked != 1)][0].item()
        raise ValueError(f"{name} must hold 0 and 1 alone, got {bad}; compare it, mask > 0, to make one")
    return checked != 0


def check_rollouts(input_ids: object, attention_mask: object) -> tuple[Tensor, Tensor]:
    """input_ids [B, T] int64 and the attention mask as bool."""
    ids = typed("input_ids", input_ids, torch.int64)
    if ids.dim() != 2:
        raise ValueError(f"input_ids must be [B, T], a row for each rollout, got {list(ids.shape)}; unsqueeze a single one")
    return ids, binary("attention_mask", attention_mask, ids, "input_ids")


def check_ids(name: str, ids: Tensor, **sizes: int | None) -> None:
    """Check on the CPU that each model has an input embedding for every id, padding included.

    Args:
        sizes: how many tokens each model's input embeddings hold, by its name; None: not known.
    """
    if ids.device.type != "cpu" or not ids.numel():
        return
    for side, rows in sizes.items():
        if rows is None or (int(ids.min()) >= 0 and int(ids.max()) < rows):
            continue
        place = ((ids < 0) | (ids >= rows)).nonzero()[0].tolist()
        all_sizes = ", ".join(f"the {each}'s {size:,}" for each, size in sizes.items() if size is not None)
        raise ValueError(
            f"{name} must hold ids that every model can read, in [0, {rows}) for the {side}, got {int(ids[tuple(place)])} at "
            f"{place}; input embeddings: {all_sizes}; draw rollouts from the tokens that all have (sample_rollouts takes "
            "vocabulary=...), and pad with one of them"
        )


def check_positions(positions: object, attended: Tensor) -> Tensor:
    """[m, 2] int64 (row, column), both the column's token and the one before it attended; checked on the CPU."""
    checked = on_device("positions", typed("positions", positions, torch.int64), attended.device, "input_ids")
    if checked.dim() != 2 or checked.shape[1] != 2:
        raise ValueError(
            f"positions must be [m, 2] (row, column), as select_candidates returns them, got {list(checked.shape)}"
        )
    if checked.device.type == "cpu" and checked.numel():
        row, column = checked.unbind(-1)
        outside = (row < 0) | (row >= attended.shape[0]) | (column < 1) | (column >= attended.shape[1])
        _refuse(outside, checked, f"lie in input_ids, which is {list(attended.shape)}, from column 1 on")
        _refuse(~(attended[row, column] & attended[row, column - 1]), checked, "be attended, and the column before them too")
    return checked


def _refuse(bad: Tensor, positions: Tensor, rule: str) -> None:
    if bad.any():
        first = int(bad.nonzero()[0])
        raise ValueError(
            f"positions must {rule}, got {positions[first].tolist()} (index {first}); select them among response tokens"
        )


def end_tokens(eos_token_id: object, model: Any) -> list[int]:
    """The end-of-sequence tokens: as given, or those of the model's generation_config; maybe none."""
    found = eos_token_id
    if found is None:
        found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        found = found.tolist() if isinstance(found, Tensor) else found
    if found is None:
        return []
    listed: list[int] = []
    for each in found if isinstance(found, list | tuple) else [found]:
        if isinstance(each, bool) or not isinstance(each, int):
            raise TypeError(f"eos_token_id must be an int, a list of ints or None, got {found!r}")
        if eos_token_id is not None and not 0 <= each <= LARGEST_INT:
            raise ValueError(f"eos_token_id must be >= 0 and an id, got {each}; None for the generation_config's, [] for none")
        listed.append(each)
    return listed


def check_generator(generator: object, device: torch.device | None = None) -> None:
    """Check for None or a torch.Generator, of the device of input_ids where that is given."""
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator must be a torch.Generator or None, got {type(generator).__name__}; make one with "
            "torch.Generator(device).manual_seed(seed)"
        )
    if device is not None and generator.device.type != device.type:
        raise ValueError(f"generator is on {generator.device}, but input_ids is on {device}; make it on that device")
