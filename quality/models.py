"""Tiny teachers and students: built, taught by supervised steps on worked answers, kept on the disk."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quality.generation import accuracy
from quality.tasks.task import END, PAD, START, Speaker, Task
from topd.files import save

WARM_UP, LOOK, EXAM = 20, 10, 128  # steps; steps; problems
Report = Callable[[str], None]


@dataclass(frozen=True)
class Size:
    """A Llama of transformers: layers, width, width of its MLP."""

    layers: int
    width: int
    mlp: int


@dataclass(frozen=True)
class Schooling:
    """How a model comes to be: everything that its weights depend on, its seeds included.

    Attributes:
        enough: None, all steps are taken and the learning rate falls over the last quarter; or the share of problems whose
            greedy answers are right at which it ends, looked at every LOOK steps: students that start alike.
    """

    size: Size
    speaker_seed: int
    decay: float
    seed: int
    steps: int
    batch: int = 64
    learning_rate: float = 3e-3
    enough: float | None = None


def new_model(task: Task, size: Size, seed: int) -> Any:
    """Return a model of the task's vocabulary with random weights, in eval mode (it has no dropout)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=task.vocabulary,
        hidden_size=size.width,
        intermediate_size=size.mlp,
        num_hidden_layers=size.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2 * (task.prompt_length + task.answer_length),
        tie_word_embeddings=True,
        initializer_range=size.width**-0.5,
        pad_token_id=PAD,
        bos_token_id=START,
        eos_token_id=END,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).eval()


def teach(model: Any, task: Task, schooling: Schooling) -> tuple[int, float]:
    """Take supervised steps on worked answers; return how many, and the mean loss of the last tenth, nats per token."""
    speaker = Speaker.of(task, schooling.speaker_seed, schooling.decay)
    generator = torch.Generator().manual_seed(schooling.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=schooling.learning_rate, weight_decay=0.01)
    whole, exam = schooling.steps, task.problems(EXAM, torch.Generator().manual_seed(schooling.seed + 1), held_out=False)
    losses: list[float] = []
    for step in range(whole):
        fall = 1.0 if schooling.enough is not None else (whole - step) / max(1, whole // 4)
        for group in optimizer.param_groups:
            group["lr"] = schooling.learning_rate * min((step + 1) / WARM_UP, fall, 1.0)
        prompts = task.problems(schooling.batch, generator, held_out=False)
        loss = cross_entropy(model, prompts, task.answers(prompts, speaker, generator))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if schooling.enough is not None and (step + 1) % LOOK == 0 and accuracy(model, task, exam) >= schooling.enough:
            break
    last = losses[-max(1, len(losses) // 10) :]
    return len(losses), sum(last) / len(last)


def cross_entropy(model: Any, prompts: Tensor, answers: Tensor) -> Tensor:
    """Return the mean of -log p over the answers' tokens, nats."""
    ids = torch.cat([prompts, answers], dim=1)
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits[:, prompts.shape[1] - 1 :]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), answers.flatten())


def schooled(task: Task, schooling: Schooling, folder: Path, report: Report) -> Any:
    """Return the model that this schooling makes of the task, from the folder where it is there already."""
    key = json.dumps([task.name, task.symbols, task.layout.tolist(), asdict(schooling)])
    path = folder / f"{task.name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt"
    model = new_model(task, schooling.size, schooling.seed)
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model
    steps, loss = teach(model, task, schooling)
    report(f"{task.name}: a model of {parameters_of(model):,} parameters, {steps} supervised steps, loss {loss:.3f}")
    folder.mkdir(parents=True, exist_ok=True)
    save(path, model.state_dict(), torch.save)
    return model


def parameters_of(model: Any) -> int:
    """Return how many parameters a model has."""
    return sum(parameter.numel() for parameter in model.parameters())
