"""What do the steps of my loop spend? A plain torch loop inside `topd.profile`: SmolLM2-360M teaches SmolLM2-135M.

pip install transformers matplotlib
python examples/profile_loop.py [teacher student folder]  # two models of the hub, or folders; profile.json and .png go there
Without a hub: examples/smollm2_pair.py writes the folders teacher and student.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import topd
from topd.integrations.rollouts import sample_rollouts

TEACHER, STUDENT, FOLDER = sys.argv[1:] or ("HuggingFaceTB/SmolLM2-360M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct", ".")
QUESTIONS = ("Why is the sky blue?", "Count from one to ten.", "Name three colours.", "What is two plus two?")

teacher = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
student = AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.float32).train()
tokenizer = AutoTokenizer.from_pretrained(STUDENT, padding_side="left")
objective = topd.OPD(student, teacher)  # or any other objective
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)


def rollouts_of(questions):
    chats = [[{"role": "user", "content": text}] for text in questions]
    options = {"add_generation_prompt": True, "padding": True, "return_tensors": "pt", "return_dict": True}
    prompts = tokenizer.apply_chat_template(chats, **options)
    return sample_rollouts(student, prompts["input_ids"], prompts["attention_mask"], max_new_tokens=32)


torch.manual_seed(0)
objective(rollouts_of(QUESTIONS)).loss.backward()  # one step before: libraries are loaded, AdamW takes its memory
optimizer.step()
with topd.profile(objective) as profile:
    for _ in range(3):
        optimizer.zero_grad()
        with profile.stage("rollouts, sampled"):  # a part of your own loop gets a name
            batch = rollouts_of(QUESTIONS)
        objective(batch).loss.backward()
        optimizer.step()
print(profile)
profile.to_json(Path(FOLDER, "profile.json"))
profile.plot(Path(FOLDER, "profile.png"))
