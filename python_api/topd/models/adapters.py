"""PEFT's adapters in a model's layers: whether it trains LoRAs alone, whether these begin at zero, a pass without them.

peft is not imported with this module: each of its layers has a flag that turns its adapters off, and names its tensors in
`adapter_layer_names`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

LORA_NAMES = {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"}


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """Return PEFT's layers in a model by their names; those of `modules_to_save` too."""
    return {name: part for name, part in model.named_modules() if hasattr(type(part), "adapter_layer_names")}


def adapter_parameters(model: nn.Module) -> set[int]:
    """Return the ids of the parameters that PEFT has added to a model."""
    layers = adapted_layers(model).values()
    tables = [attrgetter(name)(layer) for layer in layers for name in layer.adapter_layer_names]
    return {id(parameter) for table in tables if isinstance(table, nn.Module) for parameter in table.parameters()}


def trains_lora_alone(model: nn.Module) -> bool:
    """Return whether all that a model trains are plain LoRAs and PEFT's copies of whole modules (modules_to_save), so that it
    is its base model while these are off."""
    layers, added = adapted_layers(model), adapter_parameters(model)
    if not layers or not all(_is_copy(layer) or _is_plain_lora(layer) for layer in layers.values()):
        return False
    return all(id(parameter) in added for parameter in model.parameters() if parameter.requires_grad)


def trained_beside_adapters(model: nn.Module) -> str | None:
    """Return the name of a parameter that a model trains and no adapter holds; None where there is none."""
    added = adapter_parameters(model)
    return next((name for name, each in model.named_parameters() if each.requires_grad and id(each) not in added), None)


def changed_by_adapters(model: nn.Module) -> str | None:
    """Return what in a model's active adapters changes its base model; None where they change nothing.

    Args:
        model: of which `trains_lora_alone` holds.
    """
    for name, layer in adapted_layers(model).items():
        if getattr(layer, "merged_adapters", ()):
            return f"merged adapters in {name}"
        for key in layer.active_adapters:
            changed = _changed_copy(layer, key) if _is_copy(layer) else _changed_lora(layer, key)
            if changed is not None:
                return f"{name}.{changed}"
    return None


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Compute with the base model meanwhile, its head included; the adapters that were on come back.

    Which of them is active, and what requires grad, stays untouched: PEFT's own `disable_adapter` makes every tensor of the
    active adapters trainable when it turns them on.

    Raises:
        ValueError: adapters are merged: a layer would be changed by turning them off.
    """
    layers = adapted_layers(model)
    for name, layer in layers.items():
        if getattr(layer, "merged_adapters", ()):
            raise ValueError(
                f"student must hold its adapters apart while it teaches with them off, got merged ones in {name}; call "
                "unmerge_adapter() first"
            )
    on = [layer for layer in layers.values() if not layer.disable_adapters]
    try:
        for layer in on:
            layer._disable_adapters = True
        if not all(layer.disable_adapters for layer in on):
            raise RuntimeError(
                "PEFT's layers must have the flag _disable_adapters, got a version without it; install peft 0.21"
            )
        yield
    finally:
        for layer in on:
            layer._disable_adapters = False


def _is_copy(layer: Any) -> bool:
    """Return whether a layer of PEFT holds trained copies of a whole module."""
    return tuple(layer.adapter_layer_names) == ("modules_to_save",)


def _is_plain_lora(layer: Any) -> bool:
    """Return whether a layer of PEFT adds b a and nothing else: no DoRA, no other variant."""
    kinds = (*getattr(layer, "lora_variant", {}).values(), *getattr(layer, "use_dora", {}).values())
    return {"lora_A", "lora_B"} <= set(layer.adapter_layer_names) <= LORA_NAMES and not any(kinds)


def _changed_lora(layer: Any, key: str) -> str | None:
    """Return which LoRA of a layer's adapter is not zero."""
    for a, b in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
        if key in getattr(layer, b):
            down, up = getattr(layer, a)[key], getattr(layer, b)[key]
            bias = getattr(up, "bias", None)
            product = _any(getattr(down, "weight", down)) and _any(getattr(up, "weight", up))
            if product or (isinstance(bias, Tensor) and _any(bias)):
                return f"{b}.{key}"
    return None


def _changed_copy(layer: Any, key: str) -> str | None:
    """Return which copy of a module (modules_to_save) differs from the original."""
    if key not in layer.modules_to_save:
        return None
    original = dict(layer.original_module.named_parameters())
    for name, copied in layer.modules_to_save[key].named_parameters():
        if not torch.equal(copied.to(original[name].dtype), original[name]):
            return f"modules_to_save.{key}.{name}"
    return None


def _any(tensor: Tensor) -> bool:
    """Return whether an entry is not zero."""
    return bool(tensor.any())
