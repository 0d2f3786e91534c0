"""The loop of torch_loop.py under accelerate: the same step in one process or in many.

pip install transformers accelerate
python examples/accelerate_loop.py [teacher student steps]  # two models of the hub, or folders, of one tokenizer
torchrun --nproc_per_node 2 examples/accelerate_loop.py
Without a hub: examples/smollm2_pair.py writes the folders teacher and student.
"""

import sys
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import AutoModelForCausalLM, AutoTokenizer

import topd
from topd.integrations.rollouts import sample_rollouts

TEACHER, STUDENT, STEPS = sys.argv[1:] or ("HuggingFaceTB/SmolLM2-360M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct", 4)
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
teacher = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32).to(accelerator.device)
student = AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.float32).train().to(accelerator.device)
tokenizer = AutoTokenizer.from_pretrained(STUDENT, padding_side="left")
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
model, optimizer = accelerator.prepare(Loss(topd.OPD(student, teacher)), optimizer)
set_seed(0, device_specific=True)  # every process samples rollouts of its own


def rollouts_of(questions):
    chats = [[{"role": "user", "content": text}] for text in questions]
    options = {"add_generation_prompt": True, "padding": True, "return_tensors": "pt", "return_dict": True}
    prompts = tokenizer.apply_chat_template(chats, **options).to(accelerator.device)
    return sample_rollouts(student, prompts["input_ids"], prompts["attention_mask"], max_new_tokens=16)


for step in range(int(STEPS)):
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
