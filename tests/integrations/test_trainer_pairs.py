"""DistillationTrainer where the teacher reads another prompt: sampled behind both prompts, or pairs from the data."""

import pytest
import torch
from compare import assert_near
from diagnostics_cases import diagnostics_of, numbers
from trainer_cases import MEASURED, InOrder, after_one_step, arguments, eight_pairs, flat, models, prompts, rows_of

import topd
from topd.integrations.rollouts import sample_rollouts
from topd.integrations.transformers import DistillationTrainer
from topd.objectives.diagnostics import DIAGNOSTICS

GREEDY = {"max_new_tokens": 9, "temperature": 0.0, "eos_token_id": list(range(0, 61, 4))}


def teacher_prompts():
    """Return the teacher's prompts of 2, 7, 1 and 4 tokens."""
    mask = torch.zeros(4, 7, dtype=torch.int64)
    for row, length in enumerate((2, 7, 1, 4)):
        mask[row, 7 - length :] = 1
    ids = torch.randint(61, (4, 7), generator=torch.Generator().manual_seed(5))
    return {"teacher_input_ids": ids, "teacher_attention_mask": mask}


@pytest.mark.parametrize("samples", [1, 2])
def test_a_sampled_response_goes_behind_both_prompts(tmp_path, samples):
    """With two samples of a prompt, which greedily are the same, the mean over the tokens is that of one."""
    objective = topd.TRD(*models())
    batch = prompts() | teacher_prompts()
    rollouts = sample_rollouts(objective.student, **prompts(), **GREEDY)
    assert len(set(rollouts["response_mask"].sum(-1).tolist())) > 1
    lists = [
        [ids[mask > 0].tolist() for ids, mask in zip(batch[key], batch[mask_key], strict=True)]
        for key, mask_key in (("input_ids", "attention_mask"), ("teacher_input_ids", "teacher_attention_mask"))
    ]
    responses = [ids[mask].tolist() for ids, mask in zip(rollouts["input_ids"], rollouts["response_mask"], strict=True)]
    expected, loss = after_one_step(objective, topd.pair(*lists, responses, 0))
    rollout = GREEDY | {"samples_per_prompt": samples}
    trainer = DistillationTrainer(objective, arguments(tmp_path), train_dataset=rows_of(batch), rollout=rollout)
    trainer.train()
    assert_near(flat(objective.student), expected, 1e-8)
    assert trainer.state.log_history[0]["opd_loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("size", [1, 8])
def test_pairs_of_the_data_are_taken_as_they_are_in_one_micro_batch_or_eight(tmp_path, size):
    objective, batch = topd.TRD(*models(), topd.TRDConfig(**MEASURED)), eight_pairs()
    expected, _ = after_one_step(objective, batch)
    diagnostics = numbers(objective(batch).totals.metrics())
    assert diagnostics.keys() == set(DIAGNOSTICS)
    assert 0 < diagnostics["clip_share"] < 1
    options = arguments(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=8 // size)
    options.per_device_eval_batch_size = size
    trainer = DistillationTrainer(objective, options, train_dataset=InOrder(rows_of(batch)), eval_dataset=rows_of(batch))
    trainer.train()
    assert_near(flat(objective.student), expected, 1e-8)
    assert diagnostics_of(trainer.state.log_history[0]) == pytest.approx(diagnostics, rel=1e-9)
    after = numbers(objective(batch).totals.metrics())
    assert diagnostics_of(trainer.evaluate(), "eval_") == pytest.approx(after, rel=1e-9)


def test_a_teachers_prompt_needs_its_mask(tmp_path):
    batch = prompts() | {"teacher_input_ids": teacher_prompts()["teacher_input_ids"]}
    trainer = DistillationTrainer(
        topd.TRD(*models()), arguments(tmp_path), train_dataset=rows_of(batch), rollout={"max_new_tokens": 2}
    )
    with pytest.raises(TypeError, match=r"teacher_attention_mask must be a torch\.Tensor, got NoneType"):
        trainer.train()
