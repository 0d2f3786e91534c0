"""A causal language model of transformers as branching needs it: hidden states, logits, and whether it can branch.

Branching hands a model a 4-D mask, positions and a cache of its own. That is exact where every layer's memory is a dense
cache of keys and values and attention takes the mask as it comes; `obstacle` says where it is not.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from topd.head import Head
from topd.logits import shape_logits
from topd.models.head_from_model import base_of, refuse_prompt_learning, unwrapped_model
from topd.models.output_layer import innermost

FULL, SLIDING = "full_attention", "sliding_attention"
FEW = range(8, 65)  # rows of logits that a CPU computes faster from the head's side


@dataclass(frozen=True, eq=False)
class Decoder:
    """A model opened up.

    Attributes:
        model: the causal language model of transformers under its wrappers.
        base: the part of it that ends in last_hidden_state.
        head: its output layer, with live parameters.
        sliding: tokens that each kind of attention layer sees back, by the kind's name; None: all of them.
        obstacle: why it cannot branch; empty where it can.
        unpackable: why it cannot read packed sequences; empty where it can.
    """

    model: Any
    base: Any
    head: Head
    sliding: dict[str, int | None]
    obstacle: str
    unpackable: str

    def states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | dict[str, Tensor] | None,
        position_ids: Tensor | None,
        cache: Any = None,
        **inputs: Any,
    ) -> Tensor:
        """last_hidden_state [B, T, H] by the base model's public forward, which may leave out what it does not take."""
        given = {"attention_mask": attention_mask, "position_ids": position_ids, "past_key_values": cache}
        given = {name: value for name, value in given.items() if value is not None and name in self.parameters}
        found = self.base(input_ids=input_ids, use_cache=cache is not None, **given, **inputs)
        return found.last_hidden_state  # type: ignore[no-any-return]

    @property
    def parameters(self) -> set[str]:
        """The names that the base model's forward takes."""
        return _parameters(self.base)

    def packed_states(self, input_ids: Tensor, position_ids: Tensor, bounds: Tensor) -> Tensor:
        """last_hidden_state [N, H] of sequences one after the other, each of which sees itself alone; of none, as in `prefill`.

        Without an attention mask transformers cuts where position_ids [N] do not go on; flash attention is told where.
        """
        if not input_ids.numel():
            one = input_ids.new_zeros(1)
            return self.packed_states(one, one, input_ids.new_tensor([0, 1]))[:0]
        varlen: dict[str, Any] = {}
        if "flash" in str(self.model.config._attn_implementation):
            offsets, longest = bounds.to(torch.int32), int(bounds.diff().max())
            varlen = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": longest, "max_length_k": longest}
        found = self.base(
            input_ids=input_ids.unsqueeze(0),
            attention_mask=None,
            position_ids=position_ids.unsqueeze(0),
            use_cache=False,
            **varlen,
        )
        return found.last_hidden_state[0]  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor, vocab: int) -> Tensor:
        """float32 (float64) logits [..., vocab] of a few states, by the model's own output layer."""
        found = _output(self.model.get_output_embeddings(), hidden)[..., : self.head.weight.shape[0]]
        found = found.to(torch.promote_types(found.dtype, torch.float32))
        return shape_logits(found, None, self.head.scale, self.head.softcap)[..., :vocab]

    @property
    def forbids_cache(self) -> bool:
        """Whether gradient checkpointing is at work, under which the layers drop every cache."""
        return bool(next(self._checkpointed(), None))

    @contextmanager
    def cache_allowed(self) -> Iterator[None]:
        """Checkpointed layers keep their cache meanwhile: their own training flag, which says to drop it, is down. Modules in
        them (dropout) stay as they are, and the flags come back."""
        paused = list(self._checkpointed())
        for module in paused:
            module.training = False
        try:
            yield
        finally:
            for module in paused:
                module.training = True

    def _checkpointed(self) -> Iterator[Any]:
        return (part for part in self.base.modules() if part.training and getattr(part, "gradient_checkpointing", False))


def _output(layer: Any, hidden: Tensor) -> Tensor:
    """The layer's output [..., V]. A CPU multiplies few rows faster as W hᵀ, 32 of them by a third: the result is a transpose,
    column by column in memory."""
    plain = type(layer) is torch.nn.Linear and layer.bias is None and not (layer._forward_hooks or layer._forward_pre_hooks)
    if plain and hidden.dim() == 2 and hidden.device.type == "cpu" and hidden.shape[0] in FEW:
        return torch.mm(layer.weight, hidden.t()).t()
    found: Tensor = layer(hidden)
    return found


def decoder_of(model: Any) -> Decoder:
    """The model opened up.

    Raises:
        TypeError, ValueError: as `topd.Head.from_model`; a PEFT prompt, which lives outside the base model.
    """
    refuse_prompt_learning(model)
    head = Head.from_model(model)
    inner = unwrapped_model(model)
    base = base_of(inner)
    if base is None:
        name = type(inner).__name__
        raise ValueError(f"model must have a base model that ends in last_hidden_state, got none in {name}")
    sliding, obstacle = _layer_kinds(inner.config)
    attention = str(getattr(inner.config, "_attn_implementation", None))
    dense, obstacle = attention in ("sdpa", "eager"), obstacle or _obstacle(inner, base)
    unpackable = "" if dense or "flash" in attention else f"attention {attention!r} is not known to keep packed sequences apart"
    return Decoder(
        inner,
        base,
        head,
        sliding,
        obstacle or ("" if dense else f"attention {attention!r} takes no 4-D mask"),
        obstacle or unpackable,
    )


def vocabulary_of(model: Any) -> int:
    """Return the entries of a model's logits; known also where its weights are sharded or offloaded."""
    inner = unwrapped_model(model)
    config = inner.config.get_text_config()
    rows = getattr(inner.get_output_embeddings(), "out_features", None)
    rows = rows if isinstance(rows, int) else int(config.vocab_size)
    unpadded = getattr(config, "unpadded_vocab_size", None)
    return min(rows, unpadded) if isinstance(unpadded, int) else rows


def embedded_tokens(model: Any) -> int | None:
    """Return how many tokens a model's input embeddings hold; None where their layer does not say."""
    rows = getattr(unwrapped_model(model).get_input_embeddings(), "num_embeddings", None)
    return rows if isinstance(rows, int) else None


def has_sharded_head(model: Any) -> bool:
    """Return whether the weight of a model's output layer is a DTensor, as FSDP2 leaves it outside a forward."""
    return hasattr(getattr(unwrapped_model(model).get_output_embeddings(), "weight", None), "placements")


def runs_uncompiled(model: Any) -> bool:
    """Return whether torch.compile was applied to the model, or a wrapper of it, alone: its base model then runs as it is."""
    inner, compiled = unwrapped_model(model), False
    for part in model.modules():  # wrappers first
        compiled = compiled or _is_compiled(part)
        if part is inner:
            break
    return compiled and not any(map(_is_compiled, inner.base_model.modules()))


def _is_compiled(module: Any) -> bool:
    """Return whether torch.compile(module) or module.compile() was applied."""
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


def _parameters(base: Any) -> set[str]:
    """Return the names that a forward takes; transformers' decorators keep its signature, wrappers (torch.compile, FSDP) do
    not."""
    return set(inspect.signature(innermost(base).forward).parameters)


def _layer_kinds(config: Any) -> tuple[dict[str, int | None], str]:
    """How far back each kind of layer sees, as transformers' own caches infer it; or why that is not known."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = [FULL if window is None else SLIDING]
    strange = sorted(set(kinds) - {FULL, SLIDING})
    if strange:
        return {}, f"layers of type {', '.join(strange)} have no dense cache"
    if SLIDING in kinds and not isinstance(window, int):
        return {}, "its sliding layers have no one window"
    return {kind: window if kind == SLIDING else None for kind in sorted(set(kinds))}, ""


def _obstacle(model: Any, base: Any) -> str:
    config = model.config
    missing = {"attention_mask", "position_ids", "past_key_values"} - _parameters(base)
    scalings = [getattr(config, name, None) or {} for name in ("rope_parameters", "rope_scaling")]  # transformers 5 and 4
    parts = [part for scaling in scalings for part in (scaling, *scaling.values())]
    ropes = {part.get("rope_type") for part in parts if isinstance(part, dict)}
    reasons = (
        (missing, f"its forward takes no {', '.join(sorted(missing))}"),
        (not getattr(model, "_supports_attention_backend", False), "its attention makes masks of its own"),
        (config.get_text_config(decoder=True) is not config, "it reads more than text"),
        (getattr(config, "attention_chunk_size", None), "its attention is chunked"),
        (getattr(config, "kv_sharing_modes", None), "its layers share caches"),
        (getattr(config, "num_kv_shared_layers", 0), "its layers share caches"),
        (getattr(config, "alibi", False), "its positions are not position_ids (ALiBi)"),
        (ropes & {"dynamic", "longrope"}, "its rotary embedding changes with the length"),
    )
    return next((reason for met, reason in reasons if met), "")
