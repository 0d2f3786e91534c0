"""TOPDTrainer where the teacher reads another prompt: a column teacher_prompt, a data_collator's pairs, self-distillation."""

import copy

import pytest
import torch
from compare import assert_near
from diagnostics_cases import diagnostics_of, numbers
from tiny_models import word_tokenizer
from tiny_trl_cases import (
    PROMPTS,
    SGD,
    WORDS,
    collated_pairs,
    inputs_with_a_tools_output,
    models,
    pair_columns,
    trainer_of,
)
from trainer_cases import GATED, LOGGED, MEASURED, after_one_step, eight_pairs, flat, four_rollouts
from two_ranks import start

import topd
from topd.integrations.trl import TOPDTrainer, to_batch

TEACHER_PROMPTS = ("word20 word2 word3", "word4", "word5 word6 word32 word33", "word34 word35")
COLUMNS = {"prompt": list(PROMPTS), "teacher_prompt": list(TEACHER_PROMPTS)}
CHAT = "{% for m in messages %}{{ m.content }} {% endfor %}{% if think %}word60 {% endif %}"


class Keeping(TOPDTrainer):
    """Keeps the batches that the objective gets."""

    def _compute_loss(self, unwrapped_student, inputs, num_items_in_batch):
        self.seen = [*getattr(self, "seen", []), to_batch(inputs)]
        return super()._compute_loss(unwrapped_student, inputs, num_items_in_batch)


def ids_of(text):
    return [WORDS.index(word) for word in text.split()]


def prompt_and_response(batch, side, row):
    ids, mask, response = (batch[side + key][row] for key in ("input_ids", "attention_mask", "response_mask"))
    return ids[(mask > 0) & (response == 0)].tolist(), ids[response > 0].tolist()


def rows_seen(trainer):
    """Return (prompt, teacher's prompt) of each row; the response is the same on both sides."""
    rows = []
    for batch in trainer.seen:
        for row in range(len(batch["input_ids"])):
            (prompt, response), (teacher_prompt, other) = (prompt_and_response(batch, side, row) for side in ("", "teacher_"))
            assert response == other
            assert 1 <= len(response) <= 4
            rows.append((prompt, teacher_prompt))
    return rows


EXPECTED = [(ids_of(prompt), ids_of(other)) for prompt, other in zip(PROMPTS, TEACHER_PROMPTS, strict=True)]


def test_the_completion_stands_behind_the_teachers_prompt(tmp_path):
    """TRL shuffles a step's rows over its micro-batches: each keeps its teacher's prompt."""
    trainer = trainer_of(tmp_path, Keeping, columns=COLUMNS, given_arguments={"gradient_accumulation_steps": 2})
    trainer.train()
    assert sorted(rows_seen(trainer)) == sorted(EXPECTED)
    trainer.seen = []
    assert trainer.evaluate()["eval_loss"] > 0
    assert sorted(rows_seen(trainer)) == sorted(EXPECTED)


@pytest.mark.parametrize(("options", "end"), [(None, []), ({"think": True}, [60])])
def test_messages_go_through_the_chat_template_with_words_of_the_teachers_own(tmp_path, options, end):
    tokenizer = word_tokenizer(*WORDS)
    tokenizer.chat_template = CHAT
    chats = {name: [[{"role": "user", "content": text}] for text in texts] for name, texts in COLUMNS.items()}
    given = {"processing_class": tokenizer, "teacher_chat_template_kwargs": options}
    trainer = trainer_of(
        tmp_path, Keeping, columns=chats, given_arguments={"per_device_train_batch_size": 4, "pad_to_multiple_of": 8}, **given
    )
    trainer.train()
    assert sorted(rows_seen(trainer)) == sorted((prompt, other + end) for prompt, other in EXPECTED)
    assert trainer.seen[0]["teacher_input_ids"].shape == (4, 16)


def test_what_tools_wrote_goes_behind_both_prompts_and_is_no_response():
    inputs = inputs_with_a_tools_output() | {
        "teacher_prompt_ids": torch.tensor([[1, 2, 3]]),
        "teacher_prompt_mask": torch.tensor([[1, 1, 1]]),
        "num_items_in_batch": torch.tensor(2),
    }
    batch = to_batch(inputs)
    assert batch["teacher_input_ids"].tolist() == [[1, 2, 3, 7, 8, 9, 0]]
    assert batch["teacher_attention_mask"].tolist() == [[1, 1, 1, 1, 1, 1, 0]]
    assert batch["teacher_response_mask"].tolist() == [[0, 0, 0, 1, 0, 1, 0]]
    assert batch["response_mask"].tolist() == [[0, 0, 1, 0, 1, 0]]


def test_pairs_of_the_data_are_taken_as_they_are_in_one_micro_batch_or_eight(tmp_path):
    """TRL is given all rows of a step at once, shuffles and splits them; nothing is sampled."""
    batch = eight_pairs()
    student, teacher = (model.double() for model in models())
    objective = topd.TRD(copy.deepcopy(student), teacher, topd.TRDConfig(**MEASURED))
    diagnostics, (expected, loss) = numbers(objective(batch).totals.metrics()), after_one_step(objective, batch)
    after = None

    for size in (8, 1):
        given = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size, **SGD}
        trainer = trainer_of(
            tmp_path,
            Keeping,
            columns=pair_columns(),
            given_models=(copy.deepcopy(student), teacher),
            given_arguments=given,
            data_collator=collated_pairs,
            objective_config=topd.TRDConfig(**MEASURED),
        )
        trainer.train()
        assert len(trainer.seen) == 8 // size
        assert_near(flat(trainer.model), expected, 1e-8)
        assert trainer.state.log_history[0]["opd_loss"] == pytest.approx(loss, rel=1e-5)
        assert diagnostics_of(trainer.state.log_history[0]) == pytest.approx(diagnostics, rel=1e-9)
        assert set(trainer.seen[0]) == set(batch)
        evaluated = diagnostics_of(trainer.evaluate(), "eval_")
        assert evaluated.keys() == diagnostics.keys()
        assert evaluated == pytest.approx(after or evaluated, rel=1e-7)
        after = evaluated


@pytest.mark.slow
def test_two_processes_take_the_step_of_all_pairs(tmp_path):
    student, teacher = (model.double() for model in models())
    objective = topd.TRD(student, teacher, topd.TRDConfig(**MEASURED))
    diagnostics, (expected, loss) = numbers(objective(eight_pairs()).totals.metrics()), after_one_step(objective, eight_pairs())
    after_topd, _ = after_one_step(topd.TOPD(student, teacher, GATED), four_rollouts())
    for each in start("integrations/two_trl_processes.py", tmp_path, timeout=300):
        assert_near(each["topd"], after_topd, 1e-8, "TOPD")
        assert_near(each["parameters"], expected, 1e-8)
        assert each["log"]["loss"] == pytest.approx(loss, **LOGGED)
        assert diagnostics_of(each["log"]) == pytest.approx(diagnostics, rel=1e-9)


@pytest.mark.parametrize("teacher", ["initial", "ema"])
def test_without_a_teacher_model_the_student_teaches_itself(tmp_path, teacher):
    student, _ = models()
    before = flat(student)
    config = topd.OPSDConfig(teacher=teacher)
    trainer = trainer_of(
        tmp_path, Keeping, 2, columns=COLUMNS, given_models=(student, None), given_arguments=SGD, objective_config=config
    )
    objective = trainer._objective
    assert isinstance(objective, topd.OPSD)
    assert objective.student is student
    trainer.train()
    assert trainer._objective is objective
    assert not torch.equal(flat(student), before)
    if teacher == "initial":
        assert torch.equal(flat(objective.teacher), before)
    assert all(row in EXPECTED for row in rows_seen(trainer))


def test_a_columns_lack_or_presence_is_refused_where_the_method_cannot_use_it(tmp_path):
    with pytest.raises(
        ValueError, match=r"objective_config must be a topd\.OPDConfig, TRDConfig or OPSDConfig .* TOPDConfig: TOP"
    ):
        trainer_of(tmp_path, TOPDTrainer, columns=COLUMNS, objective_config=None)
    with pytest.raises(ValueError, match=r"the dataset must have a column teacher_prompt where .* topd\.TRDConfig, got none"):
        trainer_of(tmp_path, TOPDTrainer, objective_config=topd.TRDConfig())
    of_a_server = {"given_models": (models()[0], None), "teacher_topk": print}
    with pytest.raises(ValueError, match="the dataset must have no column teacher_prompt where teacher_topk is given, got one"):
        trainer_of(tmp_path, TOPDTrainer, columns=COLUMNS, **of_a_server, objective_config=topd.OPDConfig("forward_kl"))
    some = COLUMNS | {"teacher_prompt": [*TEACHER_PROMPTS[:3], None]}
    given = {"per_device_train_batch_size": 4}
    with pytest.raises(ValueError, match="teacher_prompt must be text or a list of messages in each row, got None in row"):
        trainer_of(tmp_path, TOPDTrainer, columns=some, given_arguments=given).train()


def test_teachers_that_do_not_go_with_a_configuration_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"teacher_model must be left out where objective_config is a topd\.OPSDConfig, got one"
    ):
        trainer_of(tmp_path, TOPDTrainer, objective_config=topd.OPSDConfig())
    no_teacher = {"given_models": (models()[0], None), "teacher_topk": print}
    with pytest.raises(ValueError, match=r"got a TRDConfig, whose method gives a teacher model prompts of its own"):
        trainer_of(tmp_path, TOPDTrainer, objective_config=topd.TRDConfig(), **no_teacher)


@pytest.mark.parametrize(
    ("collator", "message"),
    [
        (lambda rows: {"input_ids": torch.ones(2, 3)}, r"data_collator must make finished rollouts, .* got \['input_ids'\]"),
        (
            lambda rows: collated_pairs(rows) | {"problem": ["a", "b"]},
            "data_collator must make finished rollouts, .* got problem, w",
        ),
        (lambda rows: collated_pairs(rows) | {"cu_seqlens": torch.tensor([0, 2])}, "must make finished rollouts, padded"),
    ],
)
def test_a_collator_that_makes_something_else_is_refused(tmp_path, collator, message):
    columns = pair_columns()
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, TOPDTrainer, columns=columns, data_collator=collator).train()
    with pytest.raises(ValueError, match=r"args.remove_unused_columns must be False where data_collator is given"):
        trainer_of(
            tmp_path, TOPDTrainer, columns=columns, data_collator=collator, given_arguments={"remove_unused_columns": True}
        )
