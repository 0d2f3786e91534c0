"""What a causal language model of transformers is, read off it without running it: its sizes, and how it is wrapped."""

from typing import Any

from topd.models.fsdp2_state import is_sharded_by_fsdp
from topd.models.head_from_model import unwrapped_model


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
    """Return whether FSDP2 keeps the weight of a model's output layer sharded, as it does outside a forward."""
    return is_sharded_by_fsdp(getattr(unwrapped_model(model).get_output_embeddings(), "weight", None))


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


def adds_router_loss(model: Any) -> bool:
    """Return whether a model's own forward adds the balancing loss of its routers, as its config says."""
    return bool(getattr(unwrapped_model(model).config.get_text_config(), "output_router_logits", False))
