"""The head of a transformers causal language model.

    logits = softcap * tanh(scale * lm_head(last_hidden_state) / softcap), the first `rows` of them

What a class does to its logits stands in its `forward`, not in its config: `logits_scaling` divides in Granite and
multiplies in HyperCLOVAX, and some configs carry an attribute that their model never applies. So the meaning is
tabled by class, and each entry names the very attribute that the class reads. Neither transformers nor peft is
imported with this module.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from topd.models.output_layer import BUILD_BY_HAND, AdapterParts, check_held, linear_and_adapter, refuse, wrapped

# What an attribute does, where the model reads it ("?": it may be absent), and in which ...ForCausalLM and
# ...ForConditionalGeneration.
_POSTPROCESSING = (
    ("softcap", "config.final_logit_softcapping", "Gemma2 Gemma3 Gemma3n Gemma4 Gemma4Unified VaultGemma", ""),
    ("softcap", "config.final_logit_softcapping", "Beam NanoChat", ""),
    ("softcap", "config.text_config.final_logit_softcapping", "", "Gemma3n Gemma4 Gemma4Unified MuseGlimmer MuseSpark"),
    ("softcap", "config.text_config.final_logit_softcapping?", "", "PaliGemma"),
    ("softcap", "final_logit_softcapping", "", "MistralLarge4"),
    ("softcap", "logit_softcap.softcap", "Inkling2", "Inkling2"),
    ("softcap", "config.logits_soft_cap", "RecurrentGemma", ""),
    ("softcap", "config.output_logit_soft_cap", "xLSTM", ""),
    ("divide", "config.logits_scaling", "Granite GraniteSWA MiniCPM3", ""),
    ("divide", "config.logits_scaling", "GraniteMoe GraniteMoeSWA GraniteMoeHybrid GraniteMoeShared", ""),
    ("divide", "config.text_config.logits_scaling", "", "Granite4Vision GraniteDocling"),
    ("divide", "config.logits_mup_width_multiplier", "Inkling", ""),
    ("divide", "config.text_config.logits_mup_width_multiplier", "", "Inkling"),
    ("multiply", "config.logits_scaling", "HyperCLOVAX", ""),
    ("multiply", "config.text_config.logits_scaling", "", "HyperCLOVAXVisionV2"),
    ("multiply", "config.text_config.output_multiplier", "", "MuseGlimmer MuseSpark"),
    ("multiply", "logit_scale", "Cohere Cohere2 Cohere2Moe CohereCompass", "CohereCompass"),
    ("multiply", "model.lm_head_multiplier", "FalconH1", ""),
    ("rows", "config.unpadded_vocab_size", "Inkling Inkling2", ""),
    ("rows", "config.text_config.unpadded_vocab_size", "", "Inkling Inkling2"),
)
# Classes whose logits are no function of last_hidden_state that a Head can express, and why.
_REFUSED = {
    "ChameleonForConditionalGeneration": "sets the logits of image tokens to the lowest number",
    "ClvpForCausalLM": "normalises last_hidden_state once more before its head",
    "ElectraForCausalLM": "puts a dense layer and a norm before its output embeddings",
    "ModernBertDecoderForCausalLM": "puts a dense layer and a norm before its output embeddings",
    "ProphetNetForCausalLM": "predicts from its n-gram streams, not from last_hidden_state",
    "Gemma4AssistantForCausalLM": "may score a subset of the vocabulary only (use_ordered_embeddings)",
    "DiffusionGemmaForBlockDiffusion": "denoises blocks of tokens",
    "Gemma4UnifiedAssistantForCausalLM": "may score a subset of the vocabulary only (use_ordered_embeddings)",
}
# Attributes that change the logits of some class, here or in code that comes with a checkpoint.
_TELLTALE = frozenset(path.rstrip("?").split(".")[-1] for _, path, *_ in _POSTPROCESSING) - {"softcap"} | {
    "dim_model_base",
    "mup_output_alpha",
    "mup_width_multiplier",
    "output_logits_scale",
    "output_multiplier_scale",
}


@dataclass(frozen=True)
class Shaping:
    """What follows the matrix product: scale, then softcap, then the first `rows` logits (None: all)."""

    scale: float = 1.0
    softcap: float | None = None
    rows: int | None = None


class HeadParts(NamedTuple):
    """What a model's output layer consists of, with the fields of `topd.Head`, which is built from it."""

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None
    adapter: AdapterParts | None


def head_from_model(model: Any) -> HeadParts:
    """Read the head off a model as its class says, without verifying it; see `topd.Head.from_model`."""
    inner = unwrapped_model(model)
    name = type(inner).__name__
    layer = inner.get_output_embeddings()
    if not isinstance(layer, nn.Module):
        refuse(name, "must have output embeddings", repr(layer), "pass the causal language model, with its lm_head")
    shaping = shaping_of(inner, layer)
    linear, adapter = linear_and_adapter(layer, name)
    weight = _first(linear.weight, shaping.rows)
    bias = None if linear.bias is None else _first(check_held("bias", linear.bias, name, 1), shaping.rows)
    if adapter is not None:
        adapter = adapter._replace(b=_first(adapter.b, shaping.rows))
    return HeadParts(weight, bias, shaping.scale, shaping.softcap, adapter)


def shaping_of(model: Any, layer: nn.Module) -> Shaping:
    """Return what a model of transformers makes of the product of its output layer; its tensors are not read."""
    shaping = Shaping()
    for part in parts_of(model, layer):
        shaping = _shaped_by(part, shaping)
    return shaping


def unwrapped_model(model: Any) -> Any:
    """Return the causal language model of transformers under PEFT and other wrappers."""
    inner = model
    while isinstance(inner, nn.Module) and not hasattr(type(inner), "get_output_embeddings"):
        peft = hasattr(type(inner), "get_base_model")
        below: Any = inner.get_base_model() if peft else wrapped(inner)  # type: ignore[operator]
        inner = None if below is inner else below
    if inner is None or not isinstance(inner, nn.Module):
        raise TypeError(
            "model must be a transformers causal language model, one with get_output_embeddings, got "
            f"{type(model).__name__}; for another model {BUILD_BY_HAND}"
        )
    return inner


def refuse_prompt_learning(model: Any) -> None:
    """Refuse a PEFT prompt, which lives outside the model's own layers, where its forward alone adds it."""
    config = getattr(model, "active_peft_config", None)
    if getattr(config, "is_prompt_learning", False):
        raise ValueError(
            f"model must continue from input_ids alone, got PEFT's {type(config).__name__}, which puts a prompt before them; "
            "take an adapter of the layers (LoRA)"
        )


def parts_of(model: Any, layer: nn.Module) -> list[Any]:
    """Return the model and, where the head belongs to a language model inside it, that one."""
    owner = next((part for part in model.modules() if any(child is layer for child in part.children())), None)
    if owner is model:
        return [model]
    if owner is None or not hasattr(type(owner), "get_output_embeddings"):
        place = "outside its modules" if owner is None else f"inside a {type(owner).__name__}"
        rule = "must apply its output embeddings to last_hidden_state itself"
        refuse(type(model).__name__, rule, f"them {place}", BUILD_BY_HAND)
    return [model, owner]


def base_of(model: Any) -> Any:
    """Return the base model that the head reads, also where its class names another; None where there is not just one."""
    owner = parts_of(model, model.get_output_embeddings())[-1]
    if (base := getattr(owner, "base_model", owner)) is not owner:
        return base
    models = [child for child in owner.children() if hasattr(type(child), "base_model_prefix")]
    return models[0] if len(models) == 1 else None


def _shaped_by(model: Any, shaping: Shaping) -> Shaping:
    """Return `shaping` followed by what the model's class does to its logits."""
    name = type(model).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        refuse(name, "must be decoder-only", "an encoder-decoder", "take a causal language model")
    known = _transformers_class(model)
    if known is None:
        _check_plain(model, name)
        return shaping
    if known in _REFUSED:
        came = f"a class that {_REFUSED[known]}"
        refuse(name, "must compute its logits as a topd.Head does", came, "take another model")
    for meaning, path in _postprocessing(known):
        value = _read(model, path, name)
        if value is None:
            continue
        if meaning == "softcap":
            shaping = replace(shaping, softcap=value)
        elif meaning == "rows":
            shaping = replace(shaping, rows=value)
        else:
            shaping = replace(shaping, scale=shaping.scale * value if meaning == "multiply" else shaping.scale / value)
    return shaping


def _postprocessing(known: str) -> list[tuple[str, str]]:
    """Return the meanings and paths of the attributes that shape the logits of a class of transformers."""
    stem, _, kind = known.partition("For")
    column = {"CausalLM": 0, "ConditionalGeneration": 1}.get(kind)
    if column is None:
        return []
    return [(meaning, path) for meaning, path, *stems in _POSTPROCESSING if stem in stems[column].split()]


def _transformers_class(model: Any) -> str | None:
    """Return the nearest class of transformers' own that defines `forward`; FSDP2 and users derive from it."""
    own = (c for c in type(model).__mro__ if c.__module__.startswith("transformers.models.") and "forward" in vars(c))
    return next((c.__name__ for c in own), None)


def _check_plain(model: Any, name: str) -> None:
    """Check that a model of an unknown class sets nothing that may shape its logits."""
    config = getattr(model, "config", None)
    for part in (config, getattr(config, "text_config", None)):
        for attribute in sorted(_TELLTALE):
            value = getattr(part, attribute, None)
            if value is not None and value != 1:
                came = f"config.{attribute} = {value!r}, whose meaning there is unknown,"
                refuse(name, "must be of a class that transformers has, or leave its logits plain", came, BUILD_BY_HAND)


def _read(model: Any, path: str, name: str) -> Any:
    """Return the attribute at a path of `_POSTPROCESSING`."""
    value, optional = model, path.endswith("?")
    for key in path.rstrip("?").split("."):
        if not hasattr(value, key) and not optional:
            refuse(name, f"must have {path}", "none", f"this version of transformers is not known; {BUILD_BY_HAND}")
        value = getattr(value, key, None)
    return value


def _first(tensor: Tensor, rows: int | None) -> Tensor:
    """Return the first rows as a view through which gradients flow, even where it comes about under no_grad."""
    if rows is None or rows >= tensor.shape[0]:
        return tensor
    if hasattr(tensor, "placements"):
        raise ValueError(
            f"model must have no padded rows where its head is a DTensor, got {tensor.shape[0]} rows for {rows} tokens; build "
            "topd.Head(weight.to_local(), shard=topd.VocabShard(group, start, vocab)), whose padding does not count"
        )
    with torch.enable_grad():
        return tensor[:rows]
