"""TOPDTrainer and what could go wrong in silence: a TRL that computes its loss elsewhere, another tokenizer, metrics of
nothing, an objective built anew at each step."""

import importlib
import math
import re
import sys
import tomllib
import types
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_trl_cases
import torch
from tiny_models import word_tokenizer
from tiny_trl_cases import WORDS, trl

import topd
from topd.integrations.trl import BATCH_HOOK, BATCH_HOOK_ARGUMENTS, VERSIONS, TOPDTrainer, as_numbers, check_hook

ROOT = Path(__file__).parents[2]


def trainer_of(folder, kind=TOPDTrainer, **options):
    return tiny_trl_cases.trainer_of(folder, kind, **options)


class Renamed:
    def _compute_the_loss(self, unwrapped_student, inputs, num_items_in_batch): ...


class Reordered:
    def _compute_loss(self, inputs, unwrapped_student, num_items_in_batch): ...


class Static:
    _compute_loss = 3


class Kept:
    def _compute_loss(self, unwrapped_student, inputs, num_items_in_batch): ...


@pytest.mark.parametrize(
    ("base", "came"),
    [
        (Renamed, "no such method"),
        (Static, "no such method"),
        (Reordered, "_compute_loss(inputs, unwrapped_student, num_items_in_batch)"),
    ],
)
def test_a_trainer_without_the_hook_is_refused(base, came):
    rule = "trl.DistillationTrainer must have _compute_loss(unwrapped_student, inputs, num_items_in_batch)"
    message = f"{rule}, in whose place topd computes its loss, got {came} in TRL {trl.__version__}; install '{VERSIONS}'"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        check_hook(base)


def test_a_trainer_with_the_hook_is_taken():
    check_hook(Kept)
    check_hook(trl.DistillationTrainer)


def test_a_trainer_without_the_batchs_hook_is_refused():
    check_hook(trl.DistillationTrainer, BATCH_HOOK, BATCH_HOOK_ARGUMENTS)
    message = (
        "must have _generate_and_score_completions(inputs), to whose batch topd adds the teacher's prompts, got no such method"
    )
    with pytest.raises(RuntimeError, match=re.escape(message)):
        check_hook(Kept, BATCH_HOOK, BATCH_HOOK_ARGUMENTS)


def test_a_trl_that_renamed_it_is_refused_at_construction(tmp_path, monkeypatch):
    monkeypatch.setattr(trl.DistillationTrainer, "_loss_of", trl.DistillationTrainer._compute_loss, raising=False)
    monkeypatch.delattr(trl.DistillationTrainer, "_compute_loss")
    with pytest.raises(RuntimeError, match="got no such method in TRL"):
        trainer_of(tmp_path)


@pytest.mark.parametrize("step", ["train", "evaluate"])
def test_a_trl_that_calls_another_method_is_refused_at_the_first_step(tmp_path, monkeypatch, step):
    """Without this it trains and logs as if nothing had happened: on TRL's own loss."""
    own = trl.DistillationTrainer._compute_loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return own(self, self.accelerator.unwrap_model(model), inputs, num_items_in_batch)[0]

    trainer = trainer_of(tmp_path)
    monkeypatch.setattr(trl.DistillationTrainer, "compute_loss", compute_loss)
    weight = trainer.model.lm_head.weight
    before = weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"compute its loss by _compute_loss, got a step without it from TRL .*; install"):
        getattr(trainer, step)()
    assert torch.equal(weight, before)


def test_a_trl_without_the_trainer_is_refused_by_its_version(monkeypatch):
    older = types.ModuleType("trl")
    older.__version__ = "1.9.2"
    monkeypatch.setitem(sys.modules, "trl", older)
    monkeypatch.delitem(sys.modules, "topd.integrations.trl")
    with pytest.raises(ImportError, match=re.escape(f"got TRL 1.9.2 without it; install '{VERSIONS}'")):
        importlib.import_module("topd.integrations.trl")


def test_the_range_is_that_of_the_extra():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert VERSIONS in extras["trl"]


def test_one_objective_for_all_steps_and_a_new_one_where_something_changed(tmp_path):
    class Keeping(TOPDTrainer):
        def _compute_loss(self, *arguments):
            output = super()._compute_loss(*arguments)
            self.objectives = [*getattr(self, "objectives", []), self._objective]
            return output

    trainer = trainer_of(tmp_path, Keeping, steps=3)
    trainer.train()
    trainer.evaluate()
    first, *others = trainer.objectives
    assert len(others) > 2
    assert all(other is first for other in others)
    assert first.student is trainer.model
    assert first.teacher is trainer.teacher_model
    trainer.objective_config = replace(trainer.objective_config, temperature=0.5)
    trainer.evaluate()
    assert trainer.objectives[-1] is not first
    assert trainer.objectives[-1].config.temperature == 0.5


def test_a_teacher_with_another_tokenizer_is_refused(tmp_path):
    other = word_tokenizer(*WORDS[:-2], WORDS[-1], WORDS[-2])
    with pytest.raises(ValueError, match="at 2 of 61 ids: 59 is 'word59' of the student and 'word60' of the teacher"):
        trainer_of(tmp_path, teacher_processing_class=other)
    trainer_of(tmp_path, teacher_processing_class=word_tokenizer(*WORDS))
    assert trainer_of(tmp_path, teacher_processing_class=other, allow_unequal_vocabularies=True).allow_unequal_vocabularies


def test_metrics_of_nothing_are_left_out_and_a_loss_that_is_nan_shows():
    metrics = {"loss": 1.0, "opd_loss": math.nan, "guidance_loss": 0.5, "distance_false_alarm": math.nan, "tokens": 3.0}
    numbers = as_numbers({name: torch.tensor(value) for name, value in metrics.items()}, 2)
    assert numbers.keys() == {"opd_loss", "guidance_loss", "tokens"}
    assert math.isnan(numbers["opd_loss"])
    assert (numbers["guidance_loss"], numbers["tokens"]) == (1.0, 3.0)


def test_a_step_that_measured_nothing_leaves_the_metric_out_of_the_log(tmp_path, monkeypatch):
    """Of two micro-batches the first has nothing to measure; of one without, nothing stands in the log."""
    distances = iter([math.nan, 4.0, math.nan, math.nan])
    whole = topd.OPD.__call__

    def with_distances(self, batch, **options):
        objective = whole(self, batch, **options)
        nothing = {"never": torch.tensor(math.nan), "distance": torch.tensor(next(distances))}
        return replace(objective, metrics=objective.metrics | nothing)

    monkeypatch.setattr(topd.OPD, "__call__", with_distances)
    trainer = trainer_of(tmp_path, steps=2)
    trainer.args.gradient_accumulation_steps = 2
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [line.get("distance", "absent") for line in lines] == [4.0, "absent"]
    assert not any("never" in line for line in lines)
