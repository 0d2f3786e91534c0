"""Rollouts without padding, [N] tokens and cu_seqlens: with flash-attn on a GPU, with torch's attention elsewhere.

pip install transformers; pip install flash-attn, where there is a GPU
python examples/packed_rollouts.py [teacher student]  # two models of the hub, or folders, of one tokenizer
Without a hub: examples/smollm2_pair.py writes the folders teacher and student.
"""

import sys
import time
from importlib.util import find_spec

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import topd
from topd.integrations.rollouts import pack_rollouts, sample_rollouts

TEACHER, STUDENT = sys.argv[1:] or ("HuggingFaceTB/SmolLM2-360M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct")
QUESTIONS = (
    "Name a colour.",
    "Ann has 3 apples and buys 4 more. She gives half of all her apples, but the odd one, to Bob, who had none. Bob then eats "
    "one, and Ann buys as many as Bob has left. How many apples has each of them in the end? Explain it step by step.",
)
FLASH = torch.cuda.is_available() and find_spec("flash_attn") is not None
DEVICE, DTYPE = ("cuda", torch.bfloat16) if FLASH else ("cpu", torch.float32)
ATTENTION = "flash_attention_2" if FLASH else "sdpa"

teacher = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=DTYPE, attn_implementation=ATTENTION).to(DEVICE)
student = AutoModelForCausalLM.from_pretrained(STUDENT, dtype=DTYPE, attn_implementation=ATTENTION).to(DEVICE)
tokenizer = AutoTokenizer.from_pretrained(STUDENT, padding_side="left")
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
    step = objective(batch)
    step.loss.backward()
    took = time.perf_counter() - start
    gradient = student.get_input_embeddings().weight.grad.float().norm()
    shapes = f"input_ids {list(batch['input_ids'].shape)}, scores {list(step.scores.reverse_kl.shape)}"
    print(f"{name}: {shapes}, {took:.2f} s, gradient's norm {gradient:.4f}, reverse KL {step.loss.item():.4f} nats")
