"""DistillationTrainer with lmbda: the data's responses, the student's own, or each with its probability, as a seed decides."""

import pytest
import torch
from compare import assert_near
from trainer_cases import after_one_step, arguments, flat, models, prompts, rows_of

import topd
from topd.integrations.responses import without_responses
from topd.integrations.rollouts import sample_rollouts
from topd.integrations.transformers import DistillationTrainer

GREEDY = {"max_new_tokens": 5, "temperature": 0.0}


def data(teacher):
    """Return prompts with the teacher's responses, of unequal lengths, and a tensor that speaks of them."""
    ends = list(range(0, 61, 7))
    return sample_rollouts(teacher, **prompts(), max_new_tokens=9, temperature=0.0, eos_token_id=ends, pad_token_id=1)


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_0_takes_the_datas_responses_and_1_samples_all_of_them_anew(tmp_path, lmbda):
    student, teacher = models()
    objective, batch = topd.OPD(student, teacher), data(teacher)
    expected, _ = after_one_step(objective, batch if lmbda == 0 else sample_rollouts(student, **prompts(), **GREEDY))
    trainer = DistillationTrainer(
        objective, arguments(tmp_path), train_dataset=rows_of(batch), rollout=GREEDY if lmbda else None, lmbda=lmbda
    )
    trainer.train()
    assert_near(flat(student), expected, 1e-9)


def decisions(folder, lmbda, resume=None, **options):
    """Return the (step, prompts' first ids) of each micro-batch that was sampled anew."""
    objective = topd.OPD(*models())
    batch, seen = data(objective.teacher), []

    def rollout(student, given):
        assert "response_mask" not in given
        seen.append((trainer.state.global_step, given["input_ids"][0].tolist()))
        return given | sample_rollouts(student, given["input_ids"], given["attention_mask"], max_new_tokens=1)

    given = {"max_steps": 8, "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 4} | options
    trainer = DistillationTrainer(
        objective, arguments(folder, **given), train_dataset=rows_of(batch), rollout=rollout, lmbda=lmbda
    )
    trainer.train(resume_from_checkpoint=resume)
    return seen


def test_between_them_a_seed_decides_and_a_run_that_goes_on_decides_alike(tmp_path):
    first = decisions(tmp_path / "first", 0.5, seed=3)
    assert 3 < len(first) < 13
    assert decisions(tmp_path / "again", 0.5, seed=3) == first
    rest = decisions(tmp_path / "on", 0.5, resume=str(tmp_path / "first" / "checkpoint-4"), seed=3)
    assert rest == [(step, ids) for step, ids in first if step >= 4]
    assert [step for step, _ in decisions(tmp_path / "other", 0.5, seed=4)] != [step for step, _ in first]


def test_an_evaluation_takes_the_datas_responses(tmp_path):
    objective = topd.OPD(*models())
    batch = data(objective.teacher)
    trainer = DistillationTrainer(objective, arguments(tmp_path), eval_dataset=rows_of(batch), rollout=GREEDY, lmbda=1.0)
    metrics = trainer.evaluate()
    assert metrics["eval_opd_loss"] == pytest.approx(objective(batch).loss.item(), rel=1e-5)
    assert metrics["eval_tokens"] == batch["response_mask"].sum()


def test_what_speaks_of_the_responses_goes_with_them():
    batch = {
        "input_ids": torch.tensor([[0, 5, 6, 7], [8, 9, 1, 0]]),
        "attention_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]]),
        "response_mask": torch.tensor([[0, 0, 1, 1], [0, 0, 1, 0]]),
        "teacher_input_ids": torch.tensor([[3, 6, 7], [4, 1, 0]]),
        "teacher_attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        "teacher_response_mask": torch.tensor([[0, 1, 1], [0, 1, 0]]),
        "verdict": torch.tensor([True, False]),
        "token_weights": torch.ones(2, 4),
        "problem": ["one", "two"],
    }
    left = without_responses(batch)
    assert left.pop("problem") == ["one", "two"]
    assert {key: value.long().tolist() for key, value in left.items()} == {
        "input_ids": [[0, 5], [8, 9]],
        "attention_mask": [[0, 1], [1, 1]],
        "teacher_input_ids": [[3], [4]],
        "teacher_attention_mask": [[1], [1]],
    }
    with pytest.raises(ValueError, match="a batch must be padded where its responses are sampled anew, got a packed one"):
        without_responses({"input_ids": torch.arange(3), "cu_seqlens": torch.tensor([0, 3])})


def test_prompts_alone_have_no_responses_to_mix(tmp_path):
    trainer = DistillationTrainer(
        topd.OPD(*models()), arguments(tmp_path), train_dataset=rows_of(prompts()), rollout=GREEDY, lmbda=0.5
    )
    with pytest.raises(ValueError, match=r"a batch must hold response_mask where lmbda is given, got .*input_ids"):
        trainer.train()
