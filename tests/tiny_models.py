"""Small random-weight language models of transformers, and ragged rollouts for them."""

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

VOCAB = 61
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "initializer_range": 0.6,
}
ALTERNATING = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama_eager": ("Llama", {"attn_implementation": "eager"}),
    "llama_many_heads": ("Llama", {"num_key_value_heads": 4}),
    "qwen3": ("Qwen3", {}),
    "gemma3_sliding": ("Gemma3", ALTERNATING),
    "gemma2_eager": ("Gemma2", {**ALTERNATING, "attn_implementation": "eager", "final_logit_softcapping": 3.0}),
    "mistral_sliding": ("Mistral", {"sliding_window": 5}),
}


def tiny(kind: str, seed: int = 0, **options: Any) -> Any:
    """Return a float32 causal language model in eval mode, without end-of-sequence tokens of its own."""
    family, own = KINDS[kind]
    torch.manual_seed(seed)
    config_class = getattr(transformers, f"{family}TextConfig" if family == "Gemma3" else f"{family}Config")
    config = config_class(**{**SIZES, **own, **options})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms are born flat
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    model.generation_config.eos_token_id = None
    return model


def bloom(seed: int = 0) -> Any:
    """Return a model whose forward takes no position_ids: it cannot branch."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.6}
    model = transformers.BloomForCausalLM(transformers.BloomConfig(**sizes)).eval()
    model.generation_config.eos_token_id = None
    return model


def word_tokenizer(*words: str) -> Any:
    """Return a tokenizer of whole words, word i with id i, the first of them for padding and for what it does not know. It
    makes no token_type_ids, which the models here do not read."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0]))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token=words[0],
        unk_token=words[0],
        eos_token=words[1],
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def checkpoint_activations(model: Any) -> None:
    """Switch checkpointing on, under the name that this version of transformers has for it."""
    name = "activation_checkpointing_enable"
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")()


def ragged() -> tuple[torch.Tensor, torch.Tensor]:
    """Return three rollouts [3, 20], padded on the left, on the right, on both sides; the padding holds tokens too."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(3, 20, dtype=torch.int64)
    mask[0, :4] = mask[1, 15:] = mask[2, :2] = mask[2, 18:] = 0
    return torch.randint(VOCAB, (3, 20), generator=generator), mask


# Unsorted; three, one and many to a rollout; the first and the last column that can be.
POSITIONS = torch.tensor([[0, 5], [0, 12], [2, 10], [0, 19], [1, 1], [2, 3], [1, 14], [0, 7], [0, 8]])
ENDS = [3, 4, 5, 6, 7]


def prefix(input_ids: torch.Tensor, mask: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Return [1, n], the attended tokens before the position."""
    row, column = position.tolist()
    return input_ids[row, :column][mask[row, :column] > 0].unsqueeze(0)


def generated(model: Any, ids: torch.Tensor, horizon: int, ends: list[int] | None) -> list[int]:
    """Return what `model.generate` makes of one prefix alone, greedily."""
    options = {"eos_token_id": ends} if ends else {}
    whole = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=horizon, do_sample=False, pad_token_id=0, **options
    )
    return whole[0, ids.shape[1] :].tolist()


def flat_gradient(model: Any) -> torch.Tensor:
    """Return the gradient of all parameters in one vector; 0 where there is none."""
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in model.parameters()])
