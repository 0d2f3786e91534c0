"""On-policy distillation with transformers.Trainer: SmolLM2-360M teaches SmolLM2-135M.

pip install transformers accelerate
python examples/transformers_trainer.py [teacher student steps]  # two models of the hub, or folders, of one tokenizer
Without a hub: examples/smollm2_pair.py writes the folders teacher and student.
"""

import sys
import tempfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

import topd
from topd.integrations.transformers import DistillationTrainer

TEACHER, STUDENT, STEPS = sys.argv[1:] or ("HuggingFaceTB/SmolLM2-360M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct", 4)
QUESTIONS = ("Why is the sky blue?", "Count from one to ten.", "Name three colours.", "What is two plus two?")

teacher = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
student = AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(STUDENT)
chats = [[{"role": "user", "content": text}] for text in QUESTIONS]
prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True) for chat in chats]


def left_padded(rows):
    return tokenizer.pad(rows, padding_side="left", return_tensors="pt")


with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder,
        max_steps=int(STEPS),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-4,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = DistillationTrainer(
        topd.OPD(student, teacher),  # or topd.TOPD(student, teacher, topd.TOPDConfig())
        arguments,
        left_padded,
        train_dataset=prompts,
        eval_dataset=prompts,
        rollout={"max_new_tokens": 16},
    )
    trainer.train()
    print(f"evaluation: reverse KL on new rollouts {trainer.evaluate()['eval_loss']:.3f} nats")
for line in trainer.state.log_history:
    if "loss" in line:
        print(f"step {line['step']}: student entropy {line['student_entropy']:.3f}, reverse KL {line['loss']:.3f} nats")
