"""What student and teacher read: contents, templates, budgets, chat templates."""

import dataclasses

import pytest
from trd_cases import TOKENIZER, character_tokenizer

from topd.trd import Prompt, PromptTooLongError, Templates, epistemic_ids, student_prompt, teacher_prompt
from topd.trd.templates import TASKS


def test_each_side_reads_what_the_method_says():
    assert student_prompt("1 + 1?").text.startswith("1 + 1?\n")
    assert "\\boxed{}" in student_prompt("1 + 1?").text
    assert "```python" in student_prompt("Sort.", task="code").text
    assert teacher_prompt("1 + 1?") == student_prompt("1 + 1?")
    reference = teacher_prompt("1 + 1?", "reference", reference="It is 2.").text
    assert reference.index("1 + 1?") < reference.index("It is 2.")
    refine = teacher_prompt("1 + 1?", "refine", rollout="It is 3.").text
    assert refine.index("1 + 1?") < refine.index("It is 3.")
    assert refine.endswith("Put the final answer in \\boxed{}.")
    both = teacher_prompt("1 + 1?", "refine", rollout="It is 3.", reference="It is 2.", task="code").text
    assert both.index("It is 3.") < both.index("It is 2.")
    assert both.endswith("```python block.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context": "refine"}, "rollout is missing"),
        ({"context": "reference"}, "reference is missing"),
        ({"context": "plain", "rollout": "x"}, "rollout is read with context='refine' alone"),
        ({"context": "plain", "reference": "x"}, "reference is not read with context='plain'"),
        ({"context": "reference", "reference": "x", "rollout": "y"}, "rollout is read with"),
        ({"context": "refined"}, "context must be one of"),
        ({"task": "prose"}, "task must be one of"),
        ({"budget": 10}, "tokenizer is missing"),
        ({"budget": 0, "tokenizer": TOKENIZER}, "budget must be > 0"),
    ],
)
def test_what_a_context_does_not_read_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        teacher_prompt("1 + 1?", **arguments)


def test_a_field_inside_a_text_stays_as_it_is():
    text = teacher_prompt("what is {rollout}?", "refine", rollout="{problem} \\boxed{3} %s {}").text
    assert "what is {rollout}?" in text
    assert "{problem} \\boxed{3} %s {}" in text


def test_words_of_your_own():
    words = Templates("Q {problem}", "Q {problem} R {reference}", "Q {problem} A {rollout}", "{problem}{rollout}{reference}")
    assert student_prompt("x", templates=words).text == "Q x"
    assert teacher_prompt("x", "refine", rollout="y", reference="z", templates=words).text == "xyz"
    with pytest.raises(ValueError, match=r"templates.refine must name {problem}, {rollout} and no other field, got {problem}"):
        dataclasses.replace(words, refine="Q {problem}")
    with pytest.raises(TypeError, match=r"templates must be a topd.trd.Templates, got dict"):
        student_prompt("x", templates={"student": "{problem}"})


def test_the_chat_template_has_its_options_per_side():
    ids = student_prompt("hi").ids(TOKENIZER, options={"enable_thinking": False})
    text = TOKENIZER.decode(ids)
    assert text.startswith("<user> hi")
    assert text.endswith("</s> <assistant> <nothink> ")
    assert TOKENIZER.decode(student_prompt("hi").ids(TOKENIZER)).endswith("<assistant> ")


def test_without_a_chat_template_the_plain_prompt_must_be_asked_for():
    plain = character_tokenizer(chat=False)
    with pytest.raises(ValueError, match="has no chat template; pass chat=False"):
        student_prompt("hi").ids(plain)
    assert plain.decode(Prompt("hi").ids(plain, chat=False)) == "hi\n"


def test_the_plain_prompt_has_no_end_token():
    from tokenizers.processors import TemplateProcessing

    tokenizer = character_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 1)]
    )
    assert Prompt("hi").ids(tokenizer, chat=False)[0] == 2
    assert 1 not in Prompt("hi").ids(tokenizer, chat=False)


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("budget", [1000, 1500, 2000, 2400])
def test_the_rollout_is_cut_at_its_end_to_the_budget(budget, chat):
    rollout = " ".join(f"step{number}é" for number in range(200))
    arguments = {"rollout": rollout, "reference": "the reference", "tokenizer": TOKENIZER, "chat": chat}
    prompt = teacher_prompt("the problem", "refine", budget=budget, **arguments)
    assert budget - 5 <= len(prompt.ids(TOKENIZER, chat=chat, options={"enable_thinking": True})) <= budget
    kept = prompt.text.split("solution:\n")[1].split("\n[The rest")[0]
    assert rollout.startswith(kept)
    assert len(rollout.encode()) - len(kept.encode()) == prompt.rollout_tokens_cut > 0
    assert prompt.reference_tokens_cut == 0
    assert "the reference" in prompt.text
    assert prompt.notice == f"{prompt.rollout_tokens_cut:,} tokens of the rollout were cut off"
    whole = teacher_prompt("the problem", "refine", budget=9999, **arguments)
    assert whole == teacher_prompt("the problem", "refine", rollout=rollout, reference="the reference")


def test_after_the_rollout_the_reference_is_cut_and_then_nothing():
    arguments = {"rollout": "r" * 300, "reference": "f" * 300, "tokenizer": TOKENIZER}
    least = len(teacher_prompt("x" * 50, "refine", rollout="", reference="").ids(TOKENIZER))
    notice = len(TASKS["math"].cut_notice)
    prompt = teacher_prompt("x" * 50, "refine", budget=least + 2 * notice + 100, **arguments)
    assert prompt.rollout_tokens_cut == 300
    assert 200 <= prompt.reference_tokens_cut < 210
    assert prompt.text.count(TASKS["math"].cut_notice) == 2
    assert "tokens of the rollout were cut off, 20" in prompt.notice
    with pytest.raises(
        PromptTooLongError, match=rf"budget is {least} tokens, .*: the problem 50, the instructions {least - 50 + 2 * notice}"
    ):
        teacher_prompt("x" * 50, "refine", budget=least, **arguments)
    with pytest.raises(ValueError, match="budget is 20 tokens"):
        teacher_prompt("x" * 50, budget=20, tokenizer=TOKENIZER)


def test_texts_of_any_script_are_cut_between_characters():
    rollout = "答え🙂é" * 100
    for budget in range(1000, 1012):
        prompt = teacher_prompt("p", "refine", rollout=rollout, tokenizer=TOKENIZER, budget=budget)
        assert "\ufffd" not in prompt.text
        assert len(prompt.ids(TOKENIZER)) <= budget


def test_epistemic_ids_are_the_first_pieces_with_and_without_a_space():
    vocabulary = TOKENIZER.get_vocab()
    assert epistemic_ids(TOKENIZER, ("Wait", "Hmm")) == sorted([vocabulary["W"], vocabulary["H"]])
    assert len(set(epistemic_ids(TOKENIZER))) == len(epistemic_ids(TOKENIZER)) > 5
