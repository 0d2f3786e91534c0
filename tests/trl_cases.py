"""TRL's trainers on slices of SmolLM2: a teacher of four layers, a student of two."""

import functools

import pytest
import smollm2_cases
import tiny_trl_cases

from topd_demo import smollm2

datasets = pytest.importorskip("datasets")


TEXTS = ("Why is the sky blue?", "Count to five.", "Name a colour.", "What is two plus two?")


@functools.cache
def teacher_and_tokenizer():
    return smollm2.sliced(smollm2_cases.model(), (0, 1, 14, 29)), smollm2_cases.tokenizer()


def student():
    return smollm2.sliced(teacher_and_tokenizer()[0], (0, 3))


def arguments(folder, **options):
    given = {"learning_rate": 1e-4, "max_steps": 3, "max_completion_length": 8}
    return tiny_trl_cases.arguments(folder, **(given | options))


def trainer_of(kind, folder, config=None, *, processing_class=None, teacher_processing_class=None, **options):
    teacher, tokenizer = teacher_and_tokenizer()
    tokenizers = {"processing_class": processing_class or tokenizer, "teacher_processing_class": teacher_processing_class}
    prompts = datasets.Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in TEXTS]})
    given = {"teacher_model": teacher, "args": arguments(folder, **options), "train_dataset": prompts, "eval_dataset": prompts}
    return kind(student(), objective_config=config, **tokenizers, **given)
