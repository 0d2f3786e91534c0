"""Distil from a file: a teacher writes its top-k log-probabilities once, a student trains from them alone.

    python examples/offline_teacher.py [folder]

The teacher's model is gone when the student trains, as it is when a server computed the file. `safetensors` is all it
needs beside topd.
"""

import os
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import topd

SEQUENCES, LENGTH, CONTEXTS, VOCAB, TEACHER_WIDTH, STUDENT_WIDTH, TOP_K, STEPS = 8, 32, 64, 4_000, 48, 32, 16, 40


def write_teacher(path: Path) -> None:
    """Run the teacher once over its data. The file appears under its name only when it is whole."""
    input_ids = torch.randint(CONTEXTS, (SEQUENCES, LENGTH))
    hidden = torch.randn(CONTEXTS, TEACHER_WIDTH)[input_ids]  # a real teacher's last_hidden_state
    logprobs, ids = topd.topk_logprobs(hidden, topd.Head(torch.randn(VOCAB, TEACHER_WIDTH) * 0.5), TOP_K)
    unfinished = path.with_suffix(".unfinished")
    save_file({"input_ids": input_ids, "teacher_ids": ids.int(), "teacher_logprobs": logprobs}, unfinished)
    os.replace(unfinished, path)


class Student(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(CONTEXTS, STUDENT_WIDTH)
        self.lm_head = torch.nn.Linear(STUDENT_WIDTH, VOCAB, bias=False)


def train(path: Path) -> None:
    data = load_file(path)
    student = Student()
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-2)
    for step in range(STEPS):
        hidden = student.embed(data["input_ids"])  # the states that predict each position's next token; no logits are computed
        head, ids = topd.Head(student.lm_head.weight), data["teacher_ids"].long()
        loss = topd.topk_divergence(hidden, head, ids, data["teacher_logprobs"], support="tail").mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 5 == 0 or step == STEPS - 1:
            print(f"step {step:2d}  forward KL to the teacher's top {TOP_K} and their tail: {loss.item():6.3f} nats")


if __name__ == "__main__":
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(sys.argv[1] if len(sys.argv) > 1 else temporary) / "teacher.safetensors"
        write_teacher(file)
        train(file)
