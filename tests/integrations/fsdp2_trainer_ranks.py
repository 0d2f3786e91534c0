"""Two ranks on which both trainers train under FSDP2 by accelerate; started by test_fsdp2_trainers.py as one process."""

import sys
from pathlib import Path

import torch
from accelerate_on_cpus import allow_fsdp
from fsdp2_cases import sharded, whole
from tiny_trl_cases import SGD, trainer_of
from trainer_cases import FEW, arguments, four_rollouts, models, prompts, rows_of
from two_ranks import fork

import topd
from topd.integrations.transformers import DistillationTrainer
from topd.integrations.trl import TOPDTrainer

WINDOWS = {"window_temperature": 0.0, "gate": "threshold", "gate_value": 0.05}
METHODS = {"opd": topd.OPDConfig(), "topd": topd.TOPDConfig(**FEW | WINDOWS)}
THREE = {"max_steps": 3, "per_device_train_batch_size": 1}


def objective_of(method, student, teacher):
    kind = topd.TOPD if method == "topd" else topd.OPD
    return kind(student, teacher, METHODS[method])


def trained(method, folder, place=None, **options):
    """Train three steps of four rollouts with transformers' Trainer; the teacher is sharded too where `place` says how."""
    student, teacher = models()
    if place is not None:
        sharded(teacher.requires_grad_(False), place)
    rows = rows_of(four_rollouts())
    objective = objective_of(method, student, teacher)
    trainer = DistillationTrainer(objective, arguments(folder, **THREE | options), train_dataset=rows)
    trainer.train()
    return trainer, student, trainer.evaluate(rows)["eval_loss"]


def trained_by_trl(method, folder, place=None, **options):
    """Train three steps of TRL's trainer on pairs, whose teacher's prompts are the student's."""
    student, teacher = models()
    if place is not None:
        sharded(teacher.requires_grad_(False), place)
    columns = {key: value.tolist() for key, value in four_rollouts().items()}
    given = {"columns": columns, "data_collator": collated} | {"objective_config": METHODS[method]}
    options = {"per_device_train_batch_size": 1, **SGD} | options
    trainer = trainer_of(folder, TOPDTrainer, 3, given_models=(student, teacher), given_arguments=options, **given)
    trainer.train()
    return trainer, student, None


def sampled(folder):
    """Train a step of TOPD on rollouts that the trainer samples, which end early on one rank or the other."""
    student, teacher = models()
    student.generation_config.eos_token_id = list(range(0, 61, 4))
    options = {"fsdp": True, "ddp_backend": "gloo", "per_device_train_batch_size": 1}
    trainer = DistillationTrainer(
        objective_of("topd", student, teacher),
        arguments(folder, **options),
        rollout={"max_new_tokens": 9},
        train_dataset=rows_of(prompts()),
    )
    trainer.train()
    return {"parameters": flat(student), "log": trainer.state.log_history[0]}


def collated(rows):
    return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


def flat(student):
    return torch.cat([whole(parameter.detach()).reshape(-1) for parameter in student.parameters()])


RUNS = [(train, method, place) for train in (trained, trained_by_trl) for method in METHODS for place in (None, "own unit")]


def work(rank):
    allow_fsdp()
    results = {}
    for train, method, place in RUNS:
        options = {"fsdp": True, "ddp_backend": "gloo", "gradient_accumulation_steps": 2}
        trainer, student, loss = train(method, Path(sys.argv[1]), place, **options)
        assert trainer.accelerator.is_fsdp2
        results[train.__name__, method, place] = {"parameters": flat(student), "loss": loss}
    return results | {"sampled": sampled(Path(sys.argv[1]))}


if __name__ == "__main__":
    fork(work)
