"""TRL's trainers on tiny models with a tokenizer of whole words."""

import pytest
import torch
from tiny_models import VOCAB, tiny, word_tokenizer
from trainer_cases import GATED, MEASURED, eight_pairs, four_rollouts

import topd

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

WORDS = [f"word{number}" for number in range(VOCAB)]
# The first two words are special tokens, which split a longer word that begins with them.
PROMPTS = ("word7 word8", "word9", "word5 word6", "word31")
SGD = {"optim": "sgd", "learning_rate": 0.5, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}


def pair_columns():
    """Return `eight_pairs` as a dataset's columns."""
    return {key: value.tolist() for key, value in eight_pairs().items()}


def collated_pairs(rows):
    """Return rows of such a dataset as the batch that they come from."""
    return {key: torch.tensor([row[key] for row in rows], dtype=value.dtype) for key, value in eight_pairs().items()}


def inputs_with_a_tools_output():
    """Return what TRL passes on of one completion, whose second token a tool wrote."""
    return {
        "prompt_ids": torch.tensor([[0, 5]]),
        "prompt_mask": torch.tensor([[0, 1]]),
        "completion_ids": torch.tensor([[7, 8, 9, 0]]),
        "completion_mask": torch.tensor([[1, 1, 1, 0]]),
        "tool_mask": torch.tensor([[1, 0, 1, 1]]),
    }


def arguments(folder, **options):
    given = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 2,
        "max_steps": 1,
        "max_completion_length": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return trl.DistillationConfig(**(given | options))


def two_steps_by_trl(folder, given_models, **given_arguments):
    """Return a TOPDTrainer of two steps, each of four of eight pairs."""
    from topd.integrations.trl import TOPDTrainer

    return trainer_of(
        folder,
        TOPDTrainer,
        steps=2,
        columns=pair_columns(),
        given_models=given_models,
        given_arguments={"per_device_train_batch_size": 4, **SGD, **given_arguments},
        data_collator=collated_pairs,
        objective_config=topd.TRDConfig(**MEASURED),
    )


def topd_by_trl(folder, given_models, steps, **given_arguments):
    """Return a TOPDTrainer of steps of two rollouts a process."""
    from topd.integrations.trl import TOPDTrainer

    rollouts = four_rollouts()
    return trainer_of(
        folder,
        TOPDTrainer,
        steps=steps,
        columns={key: value.tolist() for key, value in rollouts.items()},
        given_models=given_models,
        given_arguments={**SGD, **given_arguments},
        data_collator=lambda rows: {key: torch.tensor([row[key] for row in rows]) for key in rollouts},
        objective_config=GATED,
    )


def models():
    return tiny("llama", initializer_range=0.2), tiny("qwen3", seed=3, initializer_range=0.2)


def trainer_of(folder, kind, steps=1, columns=None, given_models=None, given_arguments=None, **options):
    """Return a trainer.

    Args:
        columns: of the dataset; None: text prompts alone.
        given_models: student and teacher.
        given_arguments: of the DistillationConfig.
    """
    student, teacher = given_models or models()
    rows = datasets.Dataset.from_dict({"prompt": list(PROMPTS)} if columns is None else columns)
    given = {"processing_class": word_tokenizer(*WORDS), "objective_config": topd.OPDConfig()} | options
    config = arguments(folder, **{"max_steps": steps, **(given_arguments or {})})
    return kind(student, teacher, config, train_dataset=rows, eval_dataset=rows, **given)
