"""Objectives in float64, rollouts, prompts and arguments for transformers' Trainer."""

import pytest
import torch
from objective_cases import batch_of
from packaging.version import Version
from tiny_models import tiny

import topd

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

# Trainer of transformers 4 rounds the losses that it logs to four digits.
LOGGED = {"rel": 1e-5, "abs": 6e-5 if Version(transformers.__version__) < Version("5") else 0.0}
MILD = {"initializer_range": 0.2}
LR = 0.5
MEASURED = {"position_clip": 1.5, "epistemic_ids": (3, 17, 40), "teacher_top2": True}
FEW = {"candidates": "top_k", "candidate_value": 2, "horizon": 4}


GATED = topd.TOPDConfig(**FEW, window_temperature=0.0, gate_value=0.4, guidance_weight=1.0)


def models():
    return tiny("llama", **MILD).double(), tiny("qwen3", seed=3, **MILD).double()


def rows_of(batch):
    """Return a dataset, a row for each rollout."""
    return [{key: value[row] for key, value in batch.items()} for row in range(len(batch["input_ids"]))]


class InOrder(torch.utils.data.IterableDataset):
    """Rows that Trainer does not shuffle, since they have no length."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def four_rollouts():
    """Return four rollouts, with responses of 11, 11, 0 and 4 tokens."""
    batch = batch_of(empty=[2])
    last = batch_of()
    last["response_mask"][2, :14] = 0
    return {key: torch.cat([value, last[key][2:]]) for key, value in batch.items()}


def prompts():
    """Return four prompts of unequal lengths, padded on the left."""
    mask = torch.ones(4, 6, dtype=torch.int64)
    mask[0, :3] = mask[2, :5] = 0
    return {"input_ids": torch.randint(61, (4, 6), generator=torch.Generator().manual_seed(2)), "attention_mask": mask}


def eight_pairs():
    """Return eight rows whose prompts have 1 to 5 tokens, the teacher's 2 to 8, the responses 0 to 9, with weights."""
    draw = torch.Generator().manual_seed(7)

    def some(length):
        return torch.randint(61, (length,), generator=draw).tolist()

    lengths = [(1, 8, 3), (5, 2, 9), (2, 4, 1), (4, 4, 0), (3, 7, 5), (1, 2, 2), (5, 6, 7), (2, 3, 4)]
    prompts, teacher_prompts, responses = ([some(row[side]) for row in lengths] for side in range(3))
    batch = topd.pair(prompts, teacher_prompts, responses, 0)
    weights = torch.rand(batch["input_ids"].shape, generator=draw, dtype=torch.float64)
    return batch | {"token_weights": weights, "verdict": torch.arange(8) % 3 == 0}


def arguments(folder, **options):
    given = {
        "output_dir": str(folder),
        "use_cpu": True,
        "optim": "sgd",
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return transformers.TrainingArguments(**(given | options))


METHODS = {"opd": topd.OPD, "topd": lambda *given: topd.TOPD(*given, GATED)}


def three_steps(method, folder, student, teacher):
    """Return a DistillationTrainer of three steps, each of two micro-batches."""
    from topd.integrations.transformers import DistillationTrainer

    objective, rows = METHODS[method](student, teacher), rows_of(four_rollouts())
    return DistillationTrainer(objective, arguments(folder, max_steps=3), train_dataset=InOrder(rows * 3))


def flat(model):
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


def after_one_step(objective, batch):
    """Return the parameters after one step of SGD on the whole batch."""
    model = objective.student
    model.zero_grad()
    loss = objective(batch).loss
    loss.backward()
    stepped = torch.cat([(p if p.grad is None else p - LR * p.grad).detach().reshape(-1) for p in model.parameters()])
    model.zero_grad()
    return stepped, loss.item()
