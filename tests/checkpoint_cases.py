"""Models of several families, to be saved as checkpoints."""

import torch
import transformers

TINY = {"vocab_size": 53, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
# What is read of the config or the files by another name in each.
FAMILIES = {
    "llama": ("Llama", {"intermediate_size": 32}),
    "tied": ("Llama", {"intermediate_size": 32, "tie_word_embeddings": True}),
    "softcap": ("Gemma2", {"intermediate_size": 32, "final_logit_softcapping": 3.0, "head_dim": 8, "num_key_value_heads": 2}),
    "divided": ("Granite", {"intermediate_size": 32, "logits_scaling": 4.0}),
    "multiplied": ("Cohere", {"intermediate_size": 32, "logit_scale": 0.25}),
    "bias": ("Phi", {"intermediate_size": 32}),
    "gpt2": ("GPT2", {}),
    "opt": ("OPT", {"ffn_dim": 32, "word_embed_proj_dim": 16}),
    "bloom": ("Bloom", {"n_layer": 2, "n_head": 2}),
    "neox": ("GPTNeoX", {"intermediate_size": 32}),
}


def model_of(name):
    """Return a model of a family, in eval mode."""
    family, options = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(TINY | options))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():  # norms and biases are born flat
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model
