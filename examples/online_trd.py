"""Online TRD in transformers.Trainer: the student answers, the teacher rewrites the answer, the student learns what it wrote.

pip install "transformers[torch]" datasets
python examples/online_trd.py [teacher student steps]  # two chat models of the hub, or folders, of one tokenizer
Without a hub: examples/smollm2_pair.py writes the folders teacher and student.
"""

import sys
import tempfile

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

import topd
from topd.integrations.refine_rollout import RefineRollout
from topd.integrations.transformers import DistillationTrainer

TEACHER, STUDENT, STEPS = sys.argv[1:] or ("HuggingFaceTB/SmolLM2-360M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct", 3)
PROBLEMS = ("What is 17 + 25?", "What is 6 * 7?", "A train goes 60 km in an hour. How far in three?", "What is half of 90?")

teacher = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
student = AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(STUDENT, padding_side="left")


def collate(rows):
    """The student's prompts, and the problems as text, which the teacher's refine prompt repeats."""
    problems = [row["problem"] for row in rows]
    chats = [[{"role": "user", "content": text}] for text in problems]
    options = {"add_generation_prompt": True, "padding": True, "return_tensors": "pt", "return_dict": True}
    return {**tokenizer.apply_chat_template(chats, **options), "problem": problems}


refine = RefineRollout(teacher, tokenizer, max_new_tokens=32, refine_max_new_tokens=48)
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
        use_cpu=True,  # on a GPU leave it out
    )
    dataset = Dataset.from_dict({"problem": PROBLEMS})
    trainer = DistillationTrainer(topd.TRD(student, teacher), arguments, collate, train_dataset=dataset, rollout=refine)
    trainer.train()
for line in trainer.state.log_history:
    if "loss" in line:
        print(f"step {line['step']}: forward KL of refined responses {line['loss']:.3f} nats")
print("refinements:", dict(refine.counts))
