"""Vocabularies that differ: what is refused, what each side loses, and what a token beyond the other's costs."""

import re

import pytest
import torch
from compare import assert_near
from objective_cases import MILD, backward, batch_of
from tiny_models import POSITIONS, VOCAB, ragged, tiny
from trainer_cases import arguments, prompts, rows_of

import topd
from topd.integrations.rollouts import pack_rollouts, sample_rollouts
from topd.integrations.transformers import DistillationTrainer
from topd.objectives.vocabularies import check_vocabularies

UNEQUAL = {"allow_unequal_vocabularies": True}
LARGE = 70
FEW = {"candidates": "top_k", "candidate_value": 3, "horizon": 6}


def larger_student():
    return tiny("llama", vocab_size=LARGE, **MILD), tiny("qwen3", seed=3, **MILD)


@pytest.mark.parametrize(
    "sizes", [(151_936, 152_064), (32_000, 32_064), (50_257, 50_304), (61, 61), (99, 100), (262_144, 261_120)]
)
def test_padding_is_no_other_vocabulary(sizes):
    check_vocabularies(*sizes, False)
    check_vocabularies(*reversed(sizes), False)


@pytest.mark.parametrize("sizes", [(49_152, 50_257), (32_000, 32_768), (97, 101), (262_144, 261_119), (503, 97)])
def test_more_than_padding_is_refused(sizes):
    for student, teacher in (sizes, sizes[::-1]):
        with pytest.raises(ValueError, match=rf"got {student:,} entries and {teacher:,}; .* allow_unequal_vocabularies=True"):
            check_vocabularies(student, teacher, False)
        check_vocabularies(student, teacher, True)


@pytest.mark.parametrize("method", [topd.OPD, topd.TOPD])
def test_objectives_refuse_when_they_are_made(method):
    with pytest.raises(ValueError, match=r"must share a vocabulary up to padding .* got 70 entries and 61"):
        method(*larger_student())
    with pytest.raises(TypeError, match="allow_unequal_vocabularies must be True or False, got 1"):
        method(*larger_student(), allow_unequal_vocabularies=1)
    with pytest.raises(TypeError, match="model must be a transformers causal language model"):
        method(torch.nn.Linear(2, 2), larger_student()[1])


@pytest.mark.parametrize("form", ["padded", "packed"])
def test_lost_mass_of_both_sides_is_a_metric(form):
    """By hand: the share of each model's probability beyond the 61 entries that both have."""
    student, teacher = larger_student()
    batch = batch_of()
    objective = topd.OPD(student, teacher, **UNEQUAL)(pack_rollouts(batch) if form == "packed" else batch)
    mask = {"attention_mask": batch["attention_mask"], "position_ids": (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)}
    with torch.no_grad():
        beyond = student(batch["input_ids"], **mask).logits.double().softmax(-1)[..., VOCAB:].sum(-1)
    expected = beyond[:, :-1][batch["response_mask"][:, 1:] > 0].mean()
    assert_near(objective.metrics["student_lost_mass"], expected, 1e-5)
    assert objective.metrics["student_lost_mass"] > 0.01
    assert objective.metrics["teacher_lost_mass"] == 0
    turned = topd.TOPD(teacher, student, topd.TOPDConfig(**FEW), **UNEQUAL)(batch).metrics
    assert_near(turned["teacher_lost_mass"], expected, 1e-5)
    assert turned["student_lost_mass"] == 0


@pytest.mark.parametrize("token", [VOCAB, -1])
@pytest.mark.parametrize("call", ["opd", "packed", "topd", "sample_windows"])
def test_a_token_that_a_model_lacks_is_refused(call, token):
    """In a rollout of the student's larger vocabulary; also in the padding, which a model embeds too."""
    student, teacher = larger_student()
    side, batch = ("teacher" if token > 0 else "student"), batch_of()
    rows = VOCAB if token > 0 else LARGE
    place = [0, 0] if call != "packed" else [3]
    batch["input_ids"][0, 0 if call != "packed" else 7] = token
    pair, config = (student, teacher), topd.TOPDConfig(**FEW)
    calls = {
        "opd": lambda: topd.OPD(*pair, **UNEQUAL)(batch),
        "packed": lambda: topd.OPD(*pair, **UNEQUAL)(pack_rollouts(batch)),
        "topd": lambda: topd.TOPD(*pair, config, **UNEQUAL)(batch),
        "sample_windows": lambda: topd.sample_windows(*pair, batch["input_ids"], batch["attention_mask"], POSITIONS),
    }
    expected = f"input_ids must hold ids that every model can read, in [0, {rows}) for the {side}, got {token} at {place}"
    with pytest.raises(ValueError, match=re.escape(expected)) as error:
        calls[call]()
    assert "the student's 70, the teacher's 61" in str(error.value)


def test_window_hidden_refuses_what_the_student_lacks():
    student, teacher = tiny("llama"), tiny("qwen3", seed=3)
    ids, mask = ragged()
    windows = topd.sample_windows(student, teacher, ids, mask, POSITIONS, horizon=4)
    wrong = ids.clone()
    wrong[1, 2] = VOCAB
    with pytest.raises(ValueError, match=r"input_ids must hold ids .* in \[0, 61\) for the student, got 61 at \[1, 2\]"):
        topd.window_hidden(student, wrong, mask, windows)
    windows.student_tokens[2, 1] = VOCAB
    with pytest.raises(ValueError, match=r"windows.student_tokens must hold ids .* got 61 at \[2, 1\]"):
        topd.window_hidden(student, ids, mask, windows)
    windows.student_tokens[2, 1] = 0
    windows.student_lengths[4] = 2
    windows.student_tokens[4, 2:] = -100  # past its length, never read
    topd.window_hidden(student, ids, mask, windows)


def prefer_beyond(student):
    """A student whose own distribution is mostly on tokens that the teacher lacks."""
    with torch.no_grad():
        student.lm_head.weight[:VOCAB] *= 0.1
        student.lm_head.weight[VOCAB:] *= 6
    return student


@pytest.mark.parametrize("embedding", ["teacher", "student", "table", "student_hidden"])
def test_a_larger_students_windows_are_drawn_where_tokens_are_compared(embedding):
    student, teacher = larger_student()
    prefer_beyond(student)
    chosen = torch.randn(VOCAB, 5) if embedding == "table" else embedding
    config = topd.TOPDConfig(embedding=chosen, **FEW)
    objective = topd.TOPD(student, teacher, config, **UNEQUAL)(batch_of(), generator=torch.Generator().manual_seed(0))
    windows = objective.near_future.windows
    assert windows.teacher_tokens.max() < VOCAB
    assert (windows.student_tokens.max() < VOCAB) == (embedding in ("teacher", "table"))
    assert backward(student, objective.loss).isfinite().all()


def test_a_table_without_a_row_for_each_common_token_is_refused():
    student, teacher = larger_student()
    config = topd.TOPDConfig(embedding=torch.randn(VOCAB - 1, 5))
    with pytest.raises(ValueError, match=r"embedding must have a row for each of the 61 tokens .*, got \[60, 5\]"):
        topd.TOPD(student, teacher, config, **UNEQUAL)


def test_rollouts_may_be_drawn_from_the_teachers_tokens_alone(tmp_path):
    student, teacher = larger_student()
    prefer_beyond(student)
    batch = prompts()
    with pytest.raises(ValueError, match=r"input_ids must hold ids .* in \[0, 61\) for the model, got 61 at \[1, 5\]"):
        sample_rollouts(teacher, torch.tensor([[0] * 6, [0] * 5 + [VOCAB]]), torch.ones(2, 6).long(), max_new_tokens=4)
    assert sample_rollouts(student, **batch, max_new_tokens=4)["input_ids"].max() >= VOCAB
    assert sample_rollouts(student, **batch, max_new_tokens=4, vocabulary=VOCAB)["input_ids"].max() < VOCAB
    with pytest.raises(ValueError, match="vocabulary must be > 0, got 0"):
        sample_rollouts(student, **batch, max_new_tokens=4, vocabulary=0)
    objective = topd.OPD(student, teacher, **UNEQUAL)
    options = {"train_dataset": rows_of(batch), "rollout": {"max_new_tokens": 4}}
    trainer = DistillationTrainer(objective, arguments(tmp_path), **options)
    trainer.train()
    assert trainer.state.log_history[0]["student_lost_mass"] > 0.01
