"""The states that `topd.linear_divergence` takes, from a transformers model."""

from typing import Any

import torch
from torch import Tensor

from topd.checks.rollouts import check_ids, check_rollouts
from topd.checks.values import check_tensor
from topd.head import Head
from topd.models.data_parallel import check_synchronised
from topd.models.decoder import Decoder, decoder_of, position_ids_of
from topd.models.properties import embedded_tokens

# What a call decides itself, and why.
OWN = {
    "inputs_embeds": "input_ids are what is read",
    "labels": "the loss is yours to compute from the states",
    "logits_to_keep": "no logits are computed, and every state is returned",
    "use_cache": "no cache is kept",
    "past_key_values": "no cache is kept",
    "cache_params": "no cache is kept",
    "cache_position": "no cache is kept",
    "output_hidden_states": "the last states alone are returned",
    "output_attentions": "the last states alone are returned",
    "return_dict": "states and a Head are returned",
}
# What transformers hands through to flash attention, in no signature.
PACKED = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}


def hidden_states(model: Any, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> tuple[Tensor, Head]:
    """Return the states that predict each next token, and the head that makes logits of them.

        hidden, head = topd.hidden_states(model, input_ids, attention_mask)
        head.logits(hidden[:, t])  # the distribution of input_ids[:, t + 1]

    One forward of the base model: no logits, no cache. It runs in the mode that the model is in, with gradients where they are
    enabled: call it under torch.no_grad() for a teacher. `topd.next_token_mask` makes the mask that belongs to the states.

    Args:
        model: a causal language model of transformers, also inside PEFT or torch.compile. Wrappers are looked through: what
            torch.compile(model) holds runs uncompiled, compiled parts of it (model.model.compile()) run compiled. Under a
            data-parallel wrapper (DDP, FSDP, DeepSpeed) of several processes a call with gradients runs inside its forward.
        input_ids: [B, T] int64, padded on either side.
        attention_mask: [B, T] bool, or integers 0 and 1; None: every token counts. With a mask the position_ids of a text
            model are its cumsum - 1, unless they are given.
        inputs: what the forward of the base model takes besides, such as position_ids or pixel_values.

    Returns:
        hidden [B, T, H] after the final norm, in the model's dtype; hidden[:, t] predicts input_ids[:, t + 1], so the last
        column predicts what comes after the row. And the Head, which holds the live parameters; `head.detach()` is a constant.

    Raises:
        TypeError, ValueError: a wrong type, shape, dtype or device; an input that the model does not take, or that this call
            decides itself; a token that the model does not have (checked on the CPU); gradients that several processes would
            not exchange; a model as `topd.Head.from_model` refuses it.
    """
    whole = torch.ones_like(check_tensor("input_ids", input_ids), dtype=torch.bool)
    ids, attended = check_rollouts(input_ids, whole if attention_mask is None else attention_mask)
    if not ids.numel():
        raise ValueError(f"input_ids must hold a token, got {list(ids.shape)}; leave an empty batch out")
    check_ids("input_ids", ids, model=embedded_tokens(model))
    check_synchronised(model, look_around=False, name="model")
    decoder = decoder_of(model)
    _check_inputs(decoder, inputs)
    positions, mask = inputs.pop("position_ids", None), None
    if attention_mask is not None:
        if "attention_mask" not in decoder.parameters:
            name = type(decoder.base).__name__
            raise ValueError(f"attention_mask must be left out, got one; {name} takes none: give it rows without padding")
        mask, config = attended.long(), decoder.model.config
        if positions is None and config.get_text_config(decoder=True) is config:
            positions = position_ids_of(attended)
    return decoder.states(ids, mask, positions, **inputs), decoder.head


def _check_inputs(decoder: Decoder, inputs: dict[str, Any]) -> None:
    """Check that the base model takes each further input by its name."""
    name, takes = type(decoder.base).__name__, decoder.parameters - OWN.keys() - {"args", "kwargs", "input_ids"}
    for key in inputs:
        if key in OWN:
            raise ValueError(f"{key} must be left out, got one; {OWN[key]}")
        if key not in takes | PACKED:
            raise ValueError(f"{key} must be left out, got one; {name} takes {', '.join(sorted(takes))}")
