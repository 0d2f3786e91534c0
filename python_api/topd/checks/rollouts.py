"""Checks of rollouts, positions in them and what models make of them, as the public functions take them."""

from typing import Any

import torch
from torch import Tensor

from topd.checks.tokens import check_position_form, refuse_positions
from topd.checks.values import LARGEST_INT, check_tensor


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
    """Return a mask of bools or of the integers 0 and 1 as bool; it has the shape of `like`, [B, T] or [N]."""
    checked = check_tensor(name, value)
    if checked.dtype.is_floating_point or checked.dtype.is_complex:
        raise TypeError(f"{name} must be bool or integers 0 and 1, got {checked.dtype}; compare it, mask > 0.5, to make one")
    check_tensor(name, checked, shape=(like.shape, f"the shape of {like_name}"), device=(like.device, like_name))
    if checked.dtype == torch.bool:
        return checked
    if checked.device.type == "cpu" and ((checked != 0) & (checked != 1)).any():
        bad = checked[(checked != 0) & (checked != 1)][0].item()
        raise ValueError(f"{name} must hold 0 and 1 alone, got {bad}; compare it, mask > 0, to make one")
    return checked != 0


def check_rollouts(input_ids: object, attention_mask: object, side: str = "") -> tuple[Tensor, Tensor]:
    """Check rollouts, and return input_ids [B, T] int64 and their attention mask as bool. Their names begin with `side`."""
    name = f"{side}input_ids"
    ids = check_tensor(name, input_ids, dtype=torch.int64)
    if ids.dim() != 2:
        raise ValueError(f"{name} must be [B, T], a row for each rollout, got {list(ids.shape)}; unsqueeze a single one")
    return ids, binary(f"{side}attention_mask", attention_mask, ids, name)


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


def check_positions(positions: object, attended: Tensor, response: Tensor | None = None) -> Tensor:
    """Check positions [m, 2] (row, column) of rollouts: on the CPU also that the column's token and the one before it are
    attended, and that it is a response token where `response` [B, T] is given."""
    checked = check_position_form(positions, attended, "input_ids")
    if checked.device.type == "cpu" and checked.numel():
        row, column = checked.unbind(-1)
        outside = (row < 0) | (row >= attended.shape[0]) | (column < 1) | (column >= attended.shape[1])
        remedy = "select them among response tokens"
        refuse_positions(outside, checked, f"lie in input_ids, which is {list(attended.shape)}, from column 1 on", remedy)
        unattended = ~(attended[row, column] & attended[row, column - 1])
        refuse_positions(unattended, checked, "be attended, and the column before them too", remedy)
        if response is not None:
            refuse_positions(~response[row, column], checked, "be response tokens, where response_mask is True", remedy)
    return checked


def end_tokens(eos_token_id: object, *models: Any) -> list[int]:
    """Return the end-of-sequence tokens: those given, or, where None, all of the models' generation_configs; maybe none."""
    if eos_token_id is not None:
        return _listed_ends(eos_token_id, lowest=0)
    ends: list[int] = []
    for model in models:
        own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        own = own.tolist() if isinstance(own, Tensor) else own
        ends += [each for each in _listed_ends([] if own is None else own) if each not in ends]
    return ends


def _listed_ends(ends: object, lowest: int | None = None) -> list[int]:
    """Check that end-of-sequence tokens are an int or a list of ints, from `lowest` on where that is given; return the list."""
    listed: list[int] = []
    for each in ends if isinstance(ends, list | tuple) else [ends]:
        if isinstance(each, bool) or not isinstance(each, int):
            raise TypeError(f"eos_token_id must be an int, a list of ints or None, got {ends!r}")
        if lowest is not None and not lowest <= each <= LARGEST_INT:
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
