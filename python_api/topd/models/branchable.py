"""Which models of transformers can branch, and which cannot and why.

Branching hands a model a 4-D mask, positions and a cache of its own. That is exact where every layer's memory is a dense
cache of keys and values, and where attention takes the mask as it comes.
"""

import inspect
from typing import Any

from topd.models.output_layer import innermost

FULL, SLIDING = "full_attention", "sliding_attention"


def forward_parameters(base: Any) -> set[str]:
    """Return the names that a forward takes; transformers' decorators keep its signature, wrappers (torch.compile, FSDP) do
    not."""
    return set(inspect.signature(innermost(base).forward).parameters)


def layer_kinds(config: Any) -> tuple[dict[str, int | None], str]:
    """Return how many tokens each kind of layer sees back (None: all), as transformers' own caches infer it, and an empty
    string; or no kinds, and why they are not known."""
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


def obstacle_of(model: Any, base: Any) -> str:
    """Return what in a model, beside the kinds of its layers, forbids branching; empty where nothing does."""
    config = model.config
    missing = {"attention_mask", "position_ids", "past_key_values"} - forward_parameters(base)
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
