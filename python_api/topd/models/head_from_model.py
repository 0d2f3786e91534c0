"""The head of a transformers causal language model.

    logits = softcap * tanh(scale * lm_head(last_hidden_state) / softcap), the first `rows` of them

What a class does to its logits stands in its `forward`, not in its config: `logits_scaling` divides in Granite and
multiplies in HyperCLOVAX, and some configs carry an attribute that their model never applies. So the meaning is
tabled by class, and each entry names the very attribute that the class reads. Neither transformers nor peft is
imported with this module.
"""

from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from topd.checks.values import FLOATING
from topd.head import Head, LowRank

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
BUILD_BY_HAND = "build topd.Head(weight, bias, scale=..., softcap=...) from what the model does"


@dataclass(frozen=True)
class _Shaping:
    """What follows the matrix product: scale, then softcap, then the first `rows` logits (None: all)."""

    scale: float = 1.0
    softcap: float | None = None
    rows: int | None = None


def head_from_model(model: Any) -> Head:
    """Read the head off a model as its class says, without verifying it; see `topd.Head.from_model`."""
    inner = unwrapped_model(model)
    name = type(inner).__name__
    layer = inner.get_output_embeddings()
    if not isinstance(layer, nn.Module):
        refuse(name, "must have output embeddings", repr(layer), "pass the causal language model, with its lm_head")
    shaping = _Shaping()
    for part in parts_of(inner, layer):
        shaping = _shaped_by(part, shaping)
    linear, adapter = linear_and_adapter(layer, name)
    weight = _first(linear.weight, shaping.rows)
    bias = None if linear.bias is None else _first(_live("bias", linear.bias, name, 1), shaping.rows)
    if adapter is not None:
        adapter = replace(adapter, b=_first(adapter.b, shaping.rows))
    return Head(weight, bias, scale=shaping.scale, softcap=shaping.softcap, adapter=adapter)


def refuse(name: str, rule: str, came: str, remedy: str) -> NoReturn:
    raise ValueError(f"model {rule}, got {came} in {name}; {remedy}")


def _unwrapped(module: nn.Module) -> nn.Module | None:
    """What torch.compile, DDP, DeepSpeed or FSDP wraps, or None."""
    children = dict(module.named_children())
    return next((children[key] for key in ("_orig_mod", "module", "_fsdp_wrapped_module") if key in children), None)


def innermost(module: nn.Module) -> nn.Module:
    """The module under its wrappers."""
    while (below := _unwrapped(module)) is not None:
        module = below
    return module


def unwrapped_model(model: Any) -> Any:
    inner = model
    while isinstance(inner, nn.Module) and not hasattr(type(inner), "get_output_embeddings"):
        peft = hasattr(type(inner), "get_base_model")
        below: Any = inner.get_base_model() if peft else _unwrapped(inner)  # type: ignore[operator]
        inner = None if below is inner else below
    if inner is None or not isinstance(inner, nn.Module):
        raise TypeError(
            "model must be a transformers causal language model, one with get_output_embeddings, got "
            f"{type(model).__name__}; for another model {BUILD_BY_HAND}"
        )
    return inner


def refuse_prompt_learning(model: Any) -> None:
    """A PEFT prompt lives outside the model's own layers, where its forward alone adds it."""
    config = getattr(model, "active_peft_config", None)
    if getattr(config, "is_prompt_learning", False):
        raise ValueError(
            f"model must continue from input_ids alone, got PEFT's {type(config).__name__}, which puts a prompt before them; "
            "take an adapter of the layers (LoRA)"
        )


def parts_of(model: Any, layer: nn.Module) -> list[Any]:
    """The model and, where the head belongs to a language model inside it, that one."""
    owner = next((part for part in model.modules() if any(child is layer for child in part.children())), None)
    if owner is model:
        return [model]
    if owner is None or not hasattr(type(owner), "get_output_embeddings"):
        place = "outside its modules" if owner is None else f"inside a {type(owner).__name__}"
        rule = "must apply its output embeddings to last_hidden_state itself"
        refuse(type(model).__name__, rule, f"them {place}", BUILD_BY_HAND)
    return [model, owner]


def base_of(model: Any) -> Any:
    """The base model that the head reads, also where its class names another; None where there is not just one."""
    owner = parts_of(model, model.get_output_embeddings())[-1]
    if (base := getattr(owner, "base_model", owner)) is not owner:
        return base
    models = [child for child in owner.children() if hasattr(type(child), "base_model_prefix")]
    return models[0] if len(models) == 1 else None


def _shaped_by(model: Any, shaping: _Shaping) -> _Shaping:
    """`shaping` followed by what the model's class does to its logits."""
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
    stem, _, kind = known.partition("For")
    column = {"CausalLM": 0, "ConditionalGeneration": 1}.get(kind)
    if column is None:
        return []
    return [(meaning, path) for meaning, path, *stems in _POSTPROCESSING if stem in stems[column].split()]


def _transformers_class(model: Any) -> str | None:
    """The nearest class of transformers' own that defines `forward`; FSDP2 and users derive from it."""
    own = (c for c in type(model).__mro__ if c.__module__.startswith("transformers.models.") and "forward" in vars(c))
    return next((c.__name__ for c in own), None)


def _check_plain(model: Any, name: str) -> None:
    config = getattr(model, "config", None)
    for part in (config, getattr(config, "text_config", None)):
        for attribute in sorted(_TELLTALE):
            value = getattr(part, attribute, None)
            if value is not None and value != 1:
                came = f"config.{attribute} = {value!r}, whose meaning there is unknown,"
                refuse(name, "must be of a class that transformers has, or leave its logits plain", came, BUILD_BY_HAND)


def _read(model: Any, path: str, name: str) -> Any:
    value, optional = model, path.endswith("?")
    for key in path.rstrip("?").split("."):
        if not hasattr(value, key) and not optional:
            refuse(name, f"must have {path}", "none", f"this version of transformers is not known; {BUILD_BY_HAND}")
        value = getattr(value, key, None)
    return value


def linear_and_adapter(layer: nn.Module, name: str) -> tuple[nn.Linear, LowRank | None]:
    """The linear layer under wrappers and PEFT, its weight checked, and its LoRA."""
    layer = innermost(layer)
    children = dict(layer.named_children())
    if isinstance(getattr(layer, "original_module", None), nn.Module):
        return linear_and_adapter(_saved_copy(layer, children, name), name)
    if "base_layer" in children:
        adapter = _lora(layer, name)
        return _plain(children["base_layer"], name), adapter
    return _plain(layer, name), None


def _plain(layer: nn.Module, name: str) -> nn.Linear:
    came = f"{type(layer).__module__}.{type(layer).__name__}"
    weight = getattr(layer, "weight", None)
    if isinstance(weight, Tensor):
        _live("weight", weight, name, 2)
    if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
        refuse(name, "must have a torch.nn.Linear as its output embeddings", came, BUILD_BY_HAND)
    return layer


def _live(what: str, tensor: Tensor, name: str, rank: int) -> Tensor:
    """`tensor` itself, if this rank holds all of it as plain floating numbers."""
    rule = f"must hold the whole {what} of its head as plain numbers on this rank"
    if hasattr(tensor, "full_tensor") and hasattr(tensor, "placements"):
        remedy = (
            f"gather it with {what}.full_tensor(grad_placements=[Partial('avg')] * mesh.ndim), so that gradients "
            "average over the ranks, and build topd.Head from the result"
        )
        refuse(name, rule, f"a DTensor with placements {tensor.placements}", remedy)
    if tensor.dtype not in FLOATING or hasattr(type(tensor), "__tensor_flatten__"):
        came = f"a quantised {type(tensor).__name__} of {tensor.dtype}"
        refuse(name, rule, came, "leave lm_head out of the quantisation (skip modules), or dequantise it")
    if tensor.numel() == 0 or tensor.dim() != rank:
        remedy = (
            "gather it: build and use the head within deepspeed.zero.GatheredParameters, or leave lm_head out of "
            "what FSDP shards"
        )
        refuse(name, rule, f"shape {list(tensor.shape)} (sharded by ZeRO-3 or FSDP?)", remedy)
    if tensor.device.type == "meta":
        refuse(name, rule, "a meta tensor (offloaded?)", "keep lm_head on a device in device_map")
    return tensor


def _first(tensor: Tensor, rows: int | None) -> Tensor:
    """The first rows as a view through which gradients flow, even if it is made under no_grad."""
    if rows is None or rows >= tensor.shape[0]:
        return tensor
    with torch.enable_grad():
        return tensor[:rows]


def _saved_copy(wrapper: Any, children: dict[str, nn.Module], name: str) -> nn.Module:
    """The module that a PEFT training wrapper (modules_to_save) calls."""
    original: nn.Module = wrapper.original_module
    active, copies = wrapper.active_adapters, children.get("modules_to_save")
    if wrapper.disable_adapters or not active:
        return original
    if not isinstance(copies, nn.ModuleDict):
        came = f"PEFT's {type(wrapper).__name__}"
        refuse(name, "may have one LoRA or modules_to_save on its head", came, "merge or disable the adapter")
    return copies[active[0]] if all(key in copies for key in active) else original


def _lora(layer: Any, name: str) -> LowRank | None:
    """The LoRA that a PEFT layer adds to its base layer as it stands; None if disabled, merged or elsewhere."""
    rule = "may have one plain LoRA on its head"
    if layer.disable_adapters or layer.merged:
        if layer.disable_adapters and layer.merged:
            refuse(name, rule, "an adapter that is disabled and still merged", "call model.unmerge_adapter() first")
        return None
    from peft.tuners.lora import Linear

    if not isinstance(layer, Linear):
        refuse(name, rule, f"PEFT's {type(layer).__module__}.{type(layer).__name__}", "merge or disable the adapter")
    active = [key for key in layer.active_adapters if key in layer.lora_A]
    if not active:
        return None
    if len(active) > 1:
        refuse(name, rule, f"{len(active)} active adapters, {active}", "activate one with set_adapter, or merge them")
    key = active[0]
    variant = layer.lora_variant.get(key)
    if variant is not None or layer.use_dora.get(key):
        came = "DoRA" if layer.use_dora.get(key) else f"the variant {type(variant).__name__}"
        refuse(name, rule, f"{came} in adapter {key!r}", "merge the adapter, or leave lm_head out of its targets")
    a, b, dropout = layer.lora_A[key], layer.lora_B[key], layer.lora_dropout[key]
    if b.bias is not None:
        refuse(name, rule, f"lora_bias in adapter {key!r}", "set lora_bias=False or merge the adapter")
    if dropout.training and getattr(dropout, "p", 0.0) > 0:
        remedy = "set lora_dropout=0 or leave lm_head out of the adapter's targets: the head has no dropout"
        refuse(name, rule, f"lora_dropout = {dropout.p} while training in adapter {key!r}", remedy)
    return LowRank(_live("lora_A", a.weight, name, 2), _live("lora_B", b.weight, name, 2), layer.scaling[key])
