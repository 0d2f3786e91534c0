"""A teacher known by its top-k, and one loaded under torch.inference_mode(), in both trainers."""

import pytest
import torch
from compare import assert_near
from tiny_models import tiny
from topk_teacher_cases import with_topk
from trainer_cases import LOGGED, after_one_step, arguments, flat, four_rollouts, models, prompts, rows_of

import topd
from topd.integrations.rollouts import sample_rollouts
from topd.integrations.transformers import DistillationTrainer

GREEDY = {"max_new_tokens": 5, "temperature": 0.0}


@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_a_step_from_a_files_topk_is_the_large_batchs(tmp_path, reduction):
    student, teacher = models()
    objective = topd.OPD(student, None, topd.OPDConfig("forward_kl", reduction=reduction, hard_weight=0.1))
    batch = with_topk(four_rollouts(), teacher)
    expected, loss = after_one_step(objective, batch)
    trainer = DistillationTrainer(objective, arguments(tmp_path), train_dataset=rows_of(batch))
    trainer.train()
    assert_near(flat(student), expected, 1e-9)
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(loss, **LOGGED)
    assert 0 < logged["teacher_topk_mass"] <= 1
    assert "teacher_entropy" not in logged


def test_a_rollout_function_asks_the_teacher_after_sampling(tmp_path):
    student, teacher = models()
    objective, batch = topd.OPD(student, None), prompts()

    def rollout(model, given):
        return with_topk(sample_rollouts(model, given["input_ids"], given["attention_mask"], **GREEDY), teacher)

    expected, _ = after_one_step(objective, rollout(student, batch))
    trainer = DistillationTrainer(objective, arguments(tmp_path), train_dataset=rows_of(batch), rollout=rollout)
    trainer.train()
    assert_near(flat(student), expected, 1e-9)
    assert trainer.evaluate(rows_of(batch))["eval_loss"] > 0


def test_options_of_sample_rollouts_cannot_bring_a_topk(tmp_path):
    with pytest.raises(ValueError, match=r"rollout must be a function, or None, where objective\.teacher is None"):
        DistillationTrainer(topd.OPD(models()[0], None), arguments(tmp_path), rollout=GREEDY)
    trainer = DistillationTrainer(topd.OPD(models()[0], None), arguments(tmp_path), train_dataset=rows_of(four_rollouts()))
    with pytest.raises(ValueError, match="batch must hold teacher_topk_logprobs and teacher_topk_ids where teacher is None"):
        trainer.train()


def test_a_teacher_loaded_under_inference_mode_trains(tmp_path):
    student, teacher = models()
    expected, _ = after_one_step(topd.OPD(student, teacher), four_rollouts())
    with torch.inference_mode():
        loaded = tiny("qwen3", seed=3, initializer_range=0.2).double()
    trainer = DistillationTrainer(topd.OPD(student, loaded), arguments(tmp_path), train_dataset=rows_of(four_rollouts()))
    trainer.train()
    assert_near(flat(student), expected, 1e-9)
