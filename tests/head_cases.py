"""Tiny models of random weights for Head.from_model, one of each way to make logits from the last hidden state."""

from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor

import topd

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
OLDER = Version(transformers.__version__) < Version("5.23")
of_the_newest = pytest.mark.skipif(OLDER, reason="the table is of transformers 5.23")
V, H = 61, 32

SIZES = {
    "vocab_size": V,
    "hidden_size": H,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

UNTIED = {"tie_word_embeddings": False}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1, "shared_intermediate_size": 16}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64, "mamba_d_state": 8, "mamba_n_groups": 1}
MLA = {"num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8}

GPT2 = {
    "vocab_size": V,
    "n_embd": H,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

INKLING = {"n_routed_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "n_shared_experts": 1}

INKLING |= {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8}

# Scales and softcaps are chosen far from 1 and small, so that a forgotten one shows.
CAUSAL = {
    "Llama tied": ("Llama", {"tie_word_embeddings": True}),
    "Llama untied": ("Llama", UNTIED),
    "Qwen3": ("Qwen3", {}),
    "Mistral": ("Mistral", {}),
    "GPT2": ("GPT2", GPT2),
    "GPTJ bias": ("GPTJ", GPT2 | {"rotary_dim": 4}),
    "Phi bias": ("Phi", {}),
    "OPT": ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 16}),
    "Mamba": ("Mamba", {"state_size": 4}),
    "Mpt unused attribute": ("Mpt", {"d_model": H, "n_heads": 4, "n_layers": 2, "vocab_size": V, "logit_scale": 3.0}),
    "Gemma2": ("Gemma2", {"final_logit_softcapping": 2.0}),
    "Gemma2 none": ("Gemma2", {"final_logit_softcapping": None}),
    "Gemma3 text": ("Gemma3Text", {"final_logit_softcapping": 1.5}),
    "VaultGemma": ("VaultGemma", {"final_logit_softcapping": 2.0}),
    "NanoChat": ("NanoChat", {"final_logit_softcapping": 2.0}),
    "RecurrentGemma": ("RecurrentGemma", {"num_hidden_layers": 3, "logits_soft_cap": 2.0, "lru_width": H}),
    "Granite": ("Granite", {"logits_scaling": 8.0}),
    "GraniteMoe": ("GraniteMoe", EXPERTS | {"logits_scaling": 6.0}),
    "GraniteMoeShared": ("GraniteMoeShared", EXPERTS | {"logits_scaling": 6.0}),
    "MiniCPM3": ("MiniCPM3", MLA | {"dim_model_base": 8}),
    "HyperCLOVAX": ("HyperCLOVAX", {"logits_scaling": 0.125}),
    "Cohere": ("Cohere", {"logit_scale": 0.0625}),
    "Cohere2": ("Cohere2", {"logit_scale": 0.25}),
    "FalconH1": ("FalconH1", MAMBA | {"lm_head_multiplier": 0.3}),
    "Inkling": ("InklingText", INKLING | {"logits_mup_width_multiplier": 4.0, "unpadded_vocab_size": 50}),
}


def spread(model: Any) -> Any:
    """Move a model away from its initial zeros and ones, so that every bias and adapter counts."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def build(name: str, options: dict[str, Any]) -> Any:
    if OLDER and not hasattr(transformers, f"{name}Config"):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    torch.manual_seed(0)
    sizes = {} if "n_embd" in options else SIZES
    config = getattr(transformers, f"{name}Config")(**sizes | options)
    return spread(transformers.AutoModelForCausalLM.from_config(config))


def llama() -> Any:
    return build("Llama", UNTIED)


def token_ids() -> Tensor:
    return torch.randint(3, V - 1, (2, 7), generator=torch.Generator().manual_seed(2))


def hidden_of(model: Any) -> Tensor:
    base = model.model if model.base_model is model else model.base_model
    return base(input_ids=token_ids()).last_hidden_state


def assert_same_logits(model: Any, hidden: Tensor | None = None) -> topd.Head:
    head = topd.Head.from_model(model)
    with torch.no_grad():
        hidden = hidden_of(model) if hidden is None else hidden
        expected = model(input_ids=token_ids()).logits
        assert expected.std() > 0.01
        torch.testing.assert_close(head.logits(hidden), expected, atol=1e-5, rtol=0)
    return head


VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}

VISION |= {"image_size": 8, "patch_size": 4}


def multimodal(name: str, text: str, **options: Any) -> Any:
    torch.manual_seed(0)
    vision = transformers.SiglipVisionConfig(**VISION, projection_dim=H).to_dict()
    config = getattr(transformers, f"{name}Config")(
        text_config=getattr(transformers, f"{text}Config")(**SIZES, **options).to_dict(),
        vision_config=vision,
        image_token_id=V - 1,
        mm_tokens_per_image=4,
        projection_dim=H,
    )
    return spread(getattr(transformers, f"{name}ForConditionalGeneration")(config))


# PEFT


def lora(model: Any | None = None, name: str = "default", **options: Any) -> Any:
    options = {"r": 3, "lora_alpha": 12, "target_modules": ["lm_head", "q_proj"]} | options
    return spread(peft.get_peft_model(model or llama(), peft.LoraConfig(**options), adapter_name=name))


def assert_same_as_wrapped(model: Any) -> topd.Head:
    with torch.no_grad():
        hidden = hidden_of(model.get_base_model())
    return assert_same_logits(model, hidden)
