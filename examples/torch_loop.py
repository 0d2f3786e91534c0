"""On-policy distillation in a plain torch loop, with gradient accumulation: SmolLM2-360M teaches SmolLM2-135M.

pip install transformers
python examples/torch_loop.py [teacher student steps]  # two models of the hub, or folders, of one tokenizer
Without a hub: examples/smollm2_pair.py writes the folders teacher and student.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import topd
from topd.integrations.rollouts import sample_rollouts

TEACHER, STUDENT, STEPS = sys.argv[1:] or ("HuggingFaceTB/SmolLM2-360M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct", 4)
QUESTIONS = ("Why is the sky blue?", "Count from one to ten.", "Name three colours.", "What is two plus two?")

teacher = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
student = AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.float32).train()
tokenizer = AutoTokenizer.from_pretrained(STUDENT, padding_side="left")
objective = topd.OPD(student, teacher)  # or topd.TOPD(student, teacher, topd.TOPDConfig())
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)


def rollouts_of(questions):
    chats = [[{"role": "user", "content": text}] for text in questions]
    options = {"add_generation_prompt": True, "padding": True, "return_tensors": "pt", "return_dict": True}
    prompts = tokenizer.apply_chat_template(chats, **options)
    return sample_rollouts(student, prompts["input_ids"], prompts["attention_mask"], max_new_tokens=16)


torch.manual_seed(0)
for step in range(int(STEPS)):
    # All rollouts of a step first: the loss is the mean over the tokens of both micro-batches.
    micro_batches = [rollouts_of(QUESTIONS[:2]), rollouts_of(QUESTIONS[2:])]
    num_items = sum(batch["response_mask"].sum() for batch in micro_batches)
    loss = 0.0
    for batch in micro_batches:
        share = objective(batch, num_items=num_items).loss
        share.backward()
        loss += share.item()
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: reverse KL over {int(num_items)} tokens {loss:.3f} nats")
