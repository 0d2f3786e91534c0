"""From a prompt to TOPD's loss: SmolLM2-360M teaches SmolLM2-135M.

pip install transformers matplotlib
python examples/topd_step.py [teacher student folder]  # two models of the hub, or folders; where the pictures go
Without a hub: examples/smollm2_pair.py writes the folders teacher and student.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import topd
from topd.integrations.rollouts import sample_rollouts
from topd.plots import plot_distance_distribution, plot_window_pair

TEACHER, STUDENT, FOLDER = sys.argv[1:] or ("HuggingFaceTB/SmolLM2-360M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct", ".")
teacher = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
student = AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(STUDENT, padding_side="left")

# A rollout of the student, as a trainer samples it: prompts left-padded, responses end at their end-of-sequence token.
torch.manual_seed(0)
chats = [[{"role": "user", "content": text}] for text in ("Why is the sky blue?", "Count from one to ten.")]
options = {"add_generation_prompt": True, "padding": True, "return_tensors": "pt", "return_dict": True}
prompts = tokenizer.apply_chat_template(chats, **options)
batch = sample_rollouts(student, prompts["input_ids"], prompts["attention_mask"], max_new_tokens=64)

# One step: candidates, both models' windows, transport, gate, guidance.
config = topd.TOPDConfig(candidates="top_k", candidate_value=4, horizon=16)  # short responses: 2.25 % would be one token
step = topd.TOPD(student, teacher, config)(batch, generator=torch.Generator().manual_seed(0))
step.loss.backward()
for name, value in step.metrics.items():
    print(f"{name:24} {value.item():8.3f}")

# The pictures: how far apart the near futures are, and the pair that is furthest.
near = step.near_future
plot_distance_distribution({"candidates": near.transport.distance}).savefig(Path(FOLDER) / "distances.png")
furthest = int(near.transport.distance.argmax())
student_texts, teacher_texts = (
    [tokenizer.decode(token) for token in tokens[furthest, : lengths[furthest]]]
    for tokens, lengths in (
        (near.windows.student_tokens, near.windows.student_lengths),
        (near.windows.teacher_tokens, near.windows.teacher_lengths),
    )
)
plot_window_pair(near.transport, furthest, student_texts, teacher_texts).savefig(Path(FOLDER) / "windows.png")
