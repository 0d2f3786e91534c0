"""`topd.profile` around trainers, which own their objective."""

import pytest
from trainer_cases import arguments, four_rollouts, models, rows_of

import topd
from topd.integrations.transformers import DistillationTrainer

STAGES = {"teacher_forward", "student_forward", "divergence", "backward_divergence", "backward_student", "objective", "rest"}


def test_a_trainers_steps_are_profiled(tmp_path):
    """Two micro-batches of two rollouts make the step."""
    batch = four_rollouts()
    trainer = DistillationTrainer(topd.OPD(*models()), arguments(tmp_path), train_dataset=rows_of(batch))
    with topd.profile(trainer.objective) as profile:
        trainer.train()
    assert (profile.report.calls, profile.report.backwards) == (2, 2)
    assert {stage.stage for stage in profile.report.stages} == STAGES
    assert profile.report.tokens == int(batch["response_mask"].sum())


@pytest.mark.parametrize("config", [topd.OPDConfig(), topd.OPSDConfig(teacher="live")], ids=["opd", "opsd"])
def test_trls_trainer_gives_its_objective(tmp_path, config):
    import tiny_trl_cases

    from topd.integrations.trl import TOPDTrainer

    columns, own = None, {}
    if isinstance(config, topd.OPSDConfig):
        columns = {"prompt": list(tiny_trl_cases.PROMPTS), "teacher_prompt": list(tiny_trl_cases.PROMPTS)}
        own["given_models"] = (tiny_trl_cases.models()[0], None)
    trainer = tiny_trl_cases.trainer_of(tmp_path, TOPDTrainer, columns=columns, objective_config=config, **own)
    assert trainer.objective is trainer.objective
    with topd.profile(trainer.objective) as profile:
        trainer.train()
    assert (profile.report.calls, profile.report.backwards) == (1, 1)
    assert {stage.stage for stage in profile.report.stages} == STAGES
    assert profile.report.objective == type(trainer.objective).__name__
