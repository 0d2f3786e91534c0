"""Layers that a model can best do without, and a student made by leaving them out.

A layer's influence is 1 - cosine of its input and its output, the mean over tokens: what turns the states least is missed least
(Men et al. 2024, arXiv 2403.03853, "ShortGPT").
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import topd


@torch.no_grad()
def least_influence(model: Any, input_ids: Tensor, attention_mask: Tensor) -> list[int]:
    """Return the numbers of all layers, that of the least influence first.

    Args:
        model: a causal language model of transformers whose base model holds its layers in `layers`.
        input_ids: [B, T] int64, a few prompts, padded on either side.
        attention_mask: [B, T] bool, or integers 0 and 1: tokens of 0 are not counted.

    Raises:
        ValueError: no token is attended.
    """
    attended = attention_mask.bool()
    if not attended.any():
        raise ValueError("attention_mask must attend to a token, got none; give a prompt")
    layers, influence = model.base_model.layers, list[float]()

    def measure(_: Any, inputs: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        states = inputs[0], output if isinstance(output, Tensor) else output[0]
        before, after = (each[attended].double() for each in states)
        influence.append(1 - torch.nn.functional.cosine_similarity(before, after, dim=-1).mean().item())

    hooks = [layer.register_forward_hook(measure) for layer in layers]
    try:
        topd.hidden_states(model, input_ids, attention_mask)
    finally:
        for hook in hooks:
            hook.remove()
    return sorted(range(len(influence)), key=influence.__getitem__)


def without_layers(model: Any, layers: Sequence[int]) -> Any:
    """Return a student: the model without these layers, with copies of all other weights, in the mode that the model is in.

    Args:
        model: as in `least_influence`.
        layers: their numbers, each once, in any order; at least one layer is left.

    Raises:
        ValueError: a number that is no layer's, one that stands there twice, or no layer is left.
    """
    count, dropped = len(model.base_model.layers), set(layers)
    if len(dropped) != len(layers) or not dropped < set(range(count)):
        raise ValueError(f"layers must be numbers from 0 to {count - 1}, each once and not all of them, got {list(layers)}")
    student = copy.deepcopy(model).requires_grad_(True)
    kept = [number for number in range(count) if number not in dropped]
    student.base_model.layers = torch.nn.ModuleList(student.base_model.layers[number] for number in kept)
    for place, layer in enumerate(student.base_model.layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = place
    config = student.config
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [config.layer_types[number] for number in kept]
    return student
