"""Context distillation: SmolLM2 learns to answer as it does behind a system prompt and four examples, without reading them.

pip install transformers
python examples/context_distillation.py [model steps]  # a chat model of the hub, or a folder
Without a hub: examples/smollm2_pair.py writes the folders teacher and student.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import topd
from topd.integrations.rollouts import sample_rollouts, with_teacher_prompts

MODEL, STEPS = sys.argv[1:] or ("HuggingFaceTB/SmolLM2-135M-Instruct", 20)
SYSTEM = 'You are a pirate. Answer in one short sentence, between "Ahoy!" and "Aye!".'
EXAMPLES = {
    "What is the capital of Italy?": "Ahoy! It is Rome. Aye!",
    "What do bees make?": "Ahoy! They make honey. Aye!",
    "Who wrote Hamlet?": "Ahoy! It was William Shakespeare. Aye!",
    "How many legs has a spider?": "Ahoy! It has eight legs. Aye!",
}
QUESTIONS = ("What colour is grass?", "What do cows drink?", "Where do fish live?", "What is the largest planet?")
HELD_OUT = ("What is the capital of France?", "Why is the sky blue?")

torch.manual_seed(0)
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).train()
tokenizer = AutoTokenizer.from_pretrained(MODEL, padding_side="left")
context = [{"role": "system", "content": SYSTEM}]
for question, answer in EXAMPLES.items():
    context += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def prompts_of(questions, before=()):
    chats = [[*before, {"role": "user", "content": text}] for text in questions]
    options = {"add_generation_prompt": True, "padding": True, "return_tensors": "pt", "return_dict": True}
    prompts = tokenizer.apply_chat_template(chats, **options)
    return prompts["input_ids"], prompts["attention_mask"]


def show(title):
    for question in HELD_OUT:
        answer = sample_rollouts(model, *prompts_of([question]), max_new_tokens=24, temperature=0)
        text = tokenizer.decode(answer["input_ids"][0][answer["response_mask"][0]], skip_special_tokens=True)
        print(f"{title}: {question} {text}")


objective = topd.OPSD(model, topd.OPSDConfig(divergence="forward_kl"))  # its teacher: a frozen copy of the model as it is now
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-5)
show("before")
for step in range(int(STEPS)):
    rollouts = sample_rollouts(model, *prompts_of(QUESTIONS), max_new_tokens=24)
    result = objective(with_teacher_prompts(rollouts, *prompts_of(QUESTIONS, context)))
    result.loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: forward KL {result.loss.item():.3f} nats")
show("after")
