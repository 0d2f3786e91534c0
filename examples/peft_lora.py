"""On-policy distillation into a LoRA, on the student's layers and on its output layer; the base weights stay.

pip install transformers peft
python examples/peft_lora.py [teacher student steps]  # two models of the hub, or folders, of one tokenizer
Without a hub: examples/smollm2_pair.py writes the folders teacher and student.
"""

import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import topd
from topd.integrations.rollouts import sample_rollouts

TEACHER, STUDENT, STEPS = sys.argv[1:] or ("HuggingFaceTB/SmolLM2-360M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct", 4)
QUESTIONS = ("Why is the sky blue?", "Count from one to ten.", "Name three colours.", "What is two plus two?")

torch.manual_seed(0)
teacher = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
base = AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(STUDENT, padding_side="left")
# The head's adapter enters topd's kernels as two thin matrices; the loss knows no dropout there, so lora_dropout stays 0.
targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
student = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=targets)).train()
student.print_trainable_parameters()
frozen = {name: value.clone() for name, value in student.named_parameters() if not value.requires_grad}

objective = topd.OPD(student, teacher)
optimizer = torch.optim.AdamW((value for value in student.parameters() if value.requires_grad), lr=2e-3)
chats = [[{"role": "user", "content": text}] for text in QUESTIONS]
options = {"add_generation_prompt": True, "padding": True, "return_tensors": "pt", "return_dict": True}
prompts = tokenizer.apply_chat_template(chats, **options)
for step in range(int(STEPS)):
    batch = sample_rollouts(student, prompts["input_ids"], prompts["attention_mask"], max_new_tokens=16)
    loss = objective(batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: reverse KL {loss.item():.3f} nats")
unchanged = all(torch.equal(value, frozen[name]) for name, value in student.named_parameters() if name in frozen)
print(f"base weights unchanged: {unchanged}")
