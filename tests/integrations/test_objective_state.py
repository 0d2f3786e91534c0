"""What trainers do for an objective that keeps something: after_step where a step was taken, its state in their checkpoints."""

import os

import pytest
import torch
from pair_cases import batch_of
from self_teacher_cases import adapted, plain
from trainer_cases import arguments, flat, models, rows_of

import topd
from topd.integrations.objective_state import FILE, load_objective, save_objective
from topd.integrations.transformers import DistillationTrainer

peft = pytest.importorskip("peft")


def trainer_of(folder, student, kind, **options):
    own = {"ema_decay": 0.5} if kind == "ema" else {}
    objective = topd.OPSD(student, topd.OPSDConfig(teacher=kind, **own))
    given = {"learning_rate": 1e-2, "optim": "adamw_torch", "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    return DistillationTrainer(objective, arguments(folder, **(given | options)), train_dataset=rows_of(batch_of()))


@pytest.mark.parametrize("kind", ["initial", "live", "ema"])
@pytest.mark.parametrize("build", [plain, adapted], ids=["plain", "LoRA"])
def test_a_resumed_run_takes_the_steps_of_an_uninterrupted_one(tmp_path, build, kind):
    whole, middle = trainer_of(tmp_path, build(), kind), tmp_path / "checkpoint-3"
    whole.train()
    resumed = trainer_of(tmp_path / "resumed", build(), kind)
    resumed.train(str(middle))
    assert (middle / FILE).exists() == (kind != "live")
    assert not list(middle.glob("*.partial"))
    assert resumed.state.global_step == 6
    torch.testing.assert_close(flat(resumed.objective.student), flat(whole.objective.student), rtol=1e-12, atol=1e-12)
    states = [each.objective.state_dict() for each in (resumed, whole)]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-12, atol=1e-12)
    losses = [each.objective(batch_of()).loss for each in (resumed, whole)]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["initial", "ema"])
def test_a_resumed_run_of_trl_takes_the_steps_of_an_uninterrupted_one(tmp_path, kind):
    """The average comes back from the checkpoint: a run that began anew there would have another teacher. A step has all rows:
    TRL draws their order anew where it resumes."""
    tiny_trl = pytest.importorskip("tiny_trl_cases")
    from topd.integrations.trl import TOPDTrainer

    own = {"ema_decay": 0.5} if kind == "ema" else {}
    given = tiny_trl.SGD | {"per_device_train_batch_size": 8, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}

    def run(folder, checkpoint=None):
        trainer = tiny_trl.trainer_of(
            folder,
            TOPDTrainer,
            columns=tiny_trl.pair_columns(),
            given_models=(tiny_trl.models()[0].double(), None),
            given_arguments=given,
            data_collator=tiny_trl.collated_pairs,
            objective_config=topd.OPSDConfig(teacher=kind, **own),
        )
        trainer.train(checkpoint)
        assert trainer.state.global_step == 4
        return trainer

    whole, middle = run(tmp_path), tmp_path / "checkpoint-2"
    assert (middle / FILE).exists()
    resumed = run(tmp_path / "resumed", str(middle))
    torch.testing.assert_close(flat(resumed.model), flat(whole.model), rtol=1e-12, atol=1e-12)
    states = [each._objective.state_dict() for each in (resumed, whole)]
    torch.testing.assert_close(*states, rtol=1e-12, atol=1e-12)
    os.remove(middle / FILE)
    with pytest.raises(ValueError, match=r"to resume OPSD from must hold objective\.pt, got none in .*checkpoint-2; it was"):
        run(tmp_path / "without", str(middle))


def test_the_average_follows_the_optimizers_steps_alone(tmp_path, monkeypatch):
    """Two micro-batches are one step; a step that float16's scale has skipped is none."""
    trainer = trainer_of(tmp_path, adapted(), "ema", max_steps=3)
    calls, training_step = [], trainer.training_step

    def skipping_the_second(*given):
        monkeypatch.setattr(
            type(trainer.accelerator), "optimizer_step_was_skipped", property(lambda each: trainer.state.global_step == 2)
        )
        return training_step(*given)

    monkeypatch.setattr(trainer, "training_step", skipping_the_second)
    monkeypatch.setattr(trainer.objective, "after_step", lambda: calls.append(trainer.state.global_step))
    trainer.train()
    assert calls == [1, 3]


def test_a_checkpoint_without_the_state_is_refused(tmp_path):
    trainer = trainer_of(tmp_path, adapted(), "ema", max_steps=3)
    trainer.train()
    os.remove(tmp_path / "checkpoint-3" / FILE)
    with pytest.raises(ValueError, match=r"to resume OPSD from must hold objective\.pt, got none in .*checkpoint-3; it was"):
        trainer_of(tmp_path, adapted(), "ema").train(resume_from_checkpoint=True)


def test_a_student_of_the_middle_of_a_run_is_no_initial_teacher(tmp_path):
    trainer = trainer_of(tmp_path, plain(), "initial", max_steps=3)
    trainer.train()
    with pytest.raises(ValueError, match=r"must hold the weights with which the run began .* let the trainer load this one"):
        trainer_of(tmp_path, trainer.objective.student, "initial").train(resume_from_checkpoint=True)


def test_other_objectives_write_no_file_and_read_none(tmp_path):
    objective = topd.OPD(*models())
    save_objective(objective, tmp_path)
    assert not list(tmp_path.iterdir())
    load_objective(objective, tmp_path)
    save_objective(topd.OPSD(adapted(), topd.OPSDConfig(teacher="ema")), tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == [FILE]
    with pytest.raises(ValueError, match="take the configuration with which the checkpoint was written"):
        load_objective(objective, tmp_path)
    with pytest.raises(ValueError, match="got one with '"):
        load_objective(topd.OPSD(plain()), tmp_path)


def test_the_gates_memory_goes_on_in_a_resumed_run_of_trl(tmp_path):
    """The objective that a checkpoint reaches is the one whose steps are taken, from construction on."""
    tiny_trl = pytest.importorskip("tiny_trl_cases")
    from topd.integrations.trl import TOPDTrainer

    given = tiny_trl.SGD | {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    few = {"candidates": "top_k", "candidate_value": 1, "horizon": 3}

    def run(folder, checkpoint=None):
        config = topd.TOPDConfig(gate="running_quantile", **few)
        trainer = tiny_trl.trainer_of(folder, TOPDTrainer, given_arguments=given, objective_config=config)
        built = trainer._objective
        trainer.train(checkpoint)
        assert trainer._objective is built
        return built.state_dict()["distances"]

    whole = run(tmp_path)
    kept = torch.load(tmp_path / "checkpoint-2" / FILE, weights_only=True)["distances"]
    assert 0 < len(kept) < len(whole)
    torch.testing.assert_close(whole[: len(kept)], kept, rtol=0, atol=0)
    resumed = run(tmp_path / "resumed", str(tmp_path / "checkpoint-2"))
    assert len(resumed) == len(whole)
    torch.testing.assert_close(resumed[: len(kept)], kept, rtol=0, atol=0)
