"""RefineRollout: online TRD's pairs by hand, what it does with rows that have no refinement, and a trainer's step with it."""

import copy

import pytest
import torch
from compare import assert_near
from tiny_models import generated, tiny
from trainer_cases import MILD, after_one_step, arguments, flat
from trd_cases import TOKENIZER, character_tokenizer

import topd
from topd.integrations.refine_rollout import RefineRollout
from topd.integrations.transformers import DistillationTrainer
from topd.trd import teacher_prompt
from topd.trd.prompts import TEACHER_OPTIONS

PROBLEMS = ["1 + 1?", "2 + 2?", "Name a number."]
REFERENCES = ["It is 2.", None, "7"]
SIZES = {"vocab_size": 260, "max_position_embeddings": 2048, **MILD}
GREEDY = {"max_new_tokens": 6, "refine_max_new_tokens": 9, "temperature": 0.0}
ENDS = [16, 78]  # of a rollout and of a refinement of these models


def models():
    student, teacher = tiny("llama", **SIZES).double(), tiny("qwen3", seed=3, **SIZES).double()
    student.generation_config.eos_token_id = teacher.generation_config.eos_token_id = ENDS
    return student, teacher


def batch_of(**more):
    rows = [TOKENIZER(text)["input_ids"] for text in PROBLEMS]
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[0] * (width - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
        "problem": PROBLEMS,
        **more,
    }


def answer(model, ids, longest):
    """Return the greedy answer to one prompt alone, up to its end token."""
    tokens = generated(model, torch.tensor([ids]), longest, [*ENDS, 1])
    stop = next((place for place, token in enumerate(tokens) if token in [*ENDS, 1]), None)
    return tokens if stop is None else tokens[: stop + 1]


def text_of(tokens):
    return TOKENIZER.decode([token for token in tokens if token not in [*ENDS, 1]], skip_special_tokens=True)


@pytest.mark.parametrize("references", [None, REFERENCES])
def test_both_sides_read_the_tokens_that_the_teacher_drew(references):
    student, teacher = models()
    prompts, teacher_prompts, responses = [], [], []
    for problem, reference in zip(PROBLEMS, references or [None] * 3, strict=True):
        prompts.append(TOKENIZER(problem)["input_ids"])
        rollout = text_of(answer(student, prompts[-1], 6))
        prompt = teacher_prompt(problem, "refine", rollout=rollout, reference=reference)
        assert rollout in prompt.text
        teacher_prompts.append(prompt.ids(TOKENIZER, options=TEACHER_OPTIONS))
        responses.append(answer(teacher, teacher_prompts[-1], 9))
    assert {response[-1] in [*ENDS, 1] for response in responses} == {True, False}
    refine = RefineRollout(teacher, TOKENIZER, **GREEDY)
    pairs = refine(student, batch_of() if references is None else batch_of(reference=references))
    expected = topd.pair(prompts, teacher_prompts, responses, 0)
    assert pairs.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(pairs[key], value), key
    assert sum(refine.counts.values()) == 3
    assert refine.counts["ok"] == sum(response[-1] in [*ENDS, 1] for response in responses)


def test_a_step_of_the_trainer_is_that_of_trd_on_the_refined_batch(tmp_path):
    student, teacher = models()
    objective, refine = topd.TRD(student, teacher), RefineRollout(teacher, TOKENIZER, **GREEDY)
    expected, _ = after_one_step(objective, refine(student, batch_of()))

    def collate(rows):
        return batch_of()

    options = arguments(tmp_path, per_device_train_batch_size=3, gradient_accumulation_steps=1)
    DistillationTrainer(objective, options, collate, train_dataset=[0, 1, 2], rollout=refine).train()
    assert_near(flat(student), expected, 1e-9)


def test_a_student_that_teaches_itself_refines_with_the_weights_with_which_it_teaches():
    """At "initial", with an adapter that is no longer zero: each token is the base model's first choice, not the student's."""
    self_teachers = pytest.importorskip("self_teacher_cases")
    base, _ = models()
    initial = copy.deepcopy(base)
    student = self_teachers.adapted(base=base)
    objective = topd.OPSD(student)
    self_teachers.step(student, size=0.5)

    def are_first_choices(pairs, model):
        with torch.no_grad():
            first = model(pairs["teacher_input_ids"], attention_mask=pairs["teacher_attention_mask"]).logits[:, :-1].argmax(-1)
        counted = pairs["teacher_response_mask"][:, 1:]
        assert counted.any()
        return torch.equal(first[counted], pairs["teacher_input_ids"][:, 1:][counted])

    pairs = [RefineRollout(each, TOKENIZER, **GREEDY)(student, batch_of()) for each in (objective, student)]
    assert are_first_choices(pairs[0], initial)
    assert are_first_choices(pairs[1], student)
    assert not are_first_choices(pairs[0], student)


def test_rows_without_a_refinement_have_empty_responses_and_are_counted():
    student, teacher = models()
    teacher.generation_config.eos_token_id = list(range(260))  # the first token ends each answer
    refine = RefineRollout(teacher, TOKENIZER, **GREEDY)
    with pytest.warns(UserWarning, match=r"3 of 3 rows of RefineRollout: the teacher wrote no text: .*counts\['empty'\]"):
        pairs = refine(student, batch_of())
    assert not pairs["response_mask"].any()
    assert not pairs["teacher_response_mask"].any()
    refine(student, batch_of())
    assert refine.counts == {"empty": 6}
    loss = topd.TRD(student, teacher)(pairs).loss
    assert loss == 0
    loss.backward()


def test_a_rollout_without_text_is_not_refined():
    student, teacher = models()
    student.generation_config.eos_token_id = list(range(260))
    refine = RefineRollout(teacher, TOKENIZER, **GREEDY)
    teacher.forward = None
    with pytest.warns(UserWarning, match="3 of 3 rows of RefineRollout: their rollouts have no text"):
        pairs = refine(student, batch_of())
    assert torch.equal(pairs["teacher_input_ids"], pairs["input_ids"])


def test_over_budget_the_rollout_is_cut_and_the_problem_never():
    student, teacher = models()
    student.generation_config.eos_token_id = None
    options = GREEDY | {"max_new_tokens": 90}
    whole = RefineRollout(teacher, TOKENIZER, **options)(student, batch_of())["teacher_attention_mask"].sum(-1).max()
    refine = RefineRollout(teacher, TOKENIZER, max_prompt_tokens=int(whole) - 60, **options)
    with pytest.warns(UserWarning, match="rows of RefineRollout: the end of their rollouts, or of their ref"):
        pairs = refine(student, batch_of())
    assert refine.counts["cut"] >= 1
    for problem, ids, mask in zip(PROBLEMS, pairs["teacher_input_ids"], pairs["teacher_attention_mask"], strict=True):
        assert problem in TOKENIZER.decode(ids[mask > 0])
    tight = RefineRollout(teacher, TOKENIZER, max_prompt_tokens=50, **options)
    with pytest.warns(UserWarning, match="3 of 3 rows of RefineRollout: their problem and instructions alone exceed"):
        assert not tight(student, batch_of())["response_mask"].any()
    assert tight.counts == {"too_long": 3}


def test_the_student_can_read_what_a_larger_teacher_writes():
    student = tiny("llama", **SIZES)
    teacher = tiny("qwen3", seed=3, **SIZES | {"vocab_size": 300})
    with torch.no_grad():
        teacher.lm_head.weight[260:] = teacher.lm_head.weight[:40] * 9
    pairs = RefineRollout(teacher, TOKENIZER, **GREEDY)(student, batch_of())
    assert pairs["input_ids"].max() < 260
    assert pairs["response_mask"].any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"problem": None},
            ValueError,
            "batch must hold problem, a list of the 3 prompts' texts, .* let data_collator",
        ),
        ({"problem": ["one"]}, ValueError, "problem must be a list with a text for each of the 3 prompts, got 1"),
        ({"reference": "one"}, ValueError, "reference must be a list with a text for each of the 3 prompts, got str"),
        ({"problem": [1, 2, 3]}, TypeError, "problem must be a string, got int"),
        ({"input_ids": None}, ValueError, r"batch must hold input_ids, a tensor \[B, P\]"),
    ],
)
def test_batches_without_texts_are_refused(change, error, message):
    student, teacher = models()
    with pytest.raises(error, match=message):
        RefineRollout(teacher, TOKENIZER, **GREEDY)(student, batch_of() | change)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"teacher": torch.nn.Linear(2, 2)}, TypeError, "teacher must have generate, got Linear"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be > 0, got 0"),
        ({"top_p": 2.0}, ValueError, "top_p must be finite and > 0 and <= 1, got 2.0"),
        ({"task": "poem"}, ValueError, "task must be one of 'math', 'code', got 'poem'"),
        ({"tokenizer": character_tokenizer(chat=False)}, ValueError, "has no chat template; pass chat=False"),
        ({"max_prompt_tokens": 2040}, ValueError, "must fit into the teacher's 2,048 positions, got 2040 and 9; lower one"),
        ({"refine_max_new_tokens": 2048}, ValueError, "must fit into the teacher's 2,048 positions, got None and 2,048"),
    ],
)
def test_wrong_options_are_refused(change, error, message):
    given = {"teacher": models()[1], "tokenizer": TOKENIZER, **GREEDY} | change
    with pytest.raises(error, match=message):
        RefineRollout(given.pop("teacher"), given.pop("tokenizer"), **given)
