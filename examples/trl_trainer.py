"""OPD or TOPD in TRL's DistillationTrainer: its rollouts, arguments and logs with topd's loss.

pip install "topd[trl]"
python examples/trl_trainer.py [teacher student steps opd|topd]  # models of the hub, or folders, of one tokenizer
Without a hub: examples/smollm2_pair.py writes the folders teacher and student.
"""

import sys
import tempfile

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DistillationConfig

import topd
from topd.integrations.trl import TOPDTrainer

PAIR = ("HuggingFaceTB/SmolLM2-360M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct")
TEACHER, STUDENT, STEPS, METHOD = (*sys.argv[1:], *(*PAIR, "3", "opd")[len(sys.argv) - 1 :])
CONFIGS = {
    "opd": topd.OPDConfig(),
    # Short completions: 50 tokens of future are more than they have. Micro-batches of two: too few for a gate of their own.
    "topd": topd.TOPDConfig(horizon=8, gate="running_quantile"),
}
QUESTIONS = ("Why is the sky blue?", "Count from one to ten.", "Name three colours.", "What is two plus two?")

teacher = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
student = AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(STUDENT)
with tempfile.TemporaryDirectory() as folder:
    arguments = DistillationConfig(
        folder,
        use_cpu=True,  # on a GPU leave both out
        bf16=False,
        max_steps=int(STEPS),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_completion_length=16,
        gradient_checkpointing=False,  # under it windows cannot use the first forward's cache and take a second
        learning_rate=1e-4,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = TOPDTrainer(
        student,
        teacher,
        arguments,
        train_dataset=Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in QUESTIONS]}),
        processing_class=tokenizer,
        objective_config=CONFIGS[METHOD],
    )
    trainer.train()
for line in trainer.state.log_history:
    if "loss" in line:
        guidance = f"guidance {line['guidance_loss']:.3f}, {line['candidates']:.0f} candidates, " if METHOD == "topd" else ""
        print(f"step {line['step']}: OPD {line['opd_loss']:.3f}, {guidance}loss {line['loss']:.3f} nats")
