"""The parts of the demo's methods whose teacher reads another prompt: problems, prompts, pairs, verdicts, coloured tokens."""

import pytest
import torch
from tiny_demo import tokenizer

from topd_demo import context, paired, paired_report, problems, prompts, solving
from topd_demo.figures import standard_error
from topd_demo.settings import Settings
from topd_demo.tokens import coloured
from topd_demo.training import Run
from topd_demo.wording import Wording


def evaluation_of(nats: float, rows: list[paired.Row], control: float | None = None) -> paired.PairedEvaluation:
    return paired.PairedEvaluation(nats, rows, Wording(0.25, 0.5, 9.0, 0.75), Wording(0.0, 1.0, 8.0, 1.0), control)


def row(student: bool, teacher: bool, nats: tuple[float, ...] = (1.0,)) -> paired.Row:
    return paired.Row("q", "", "s", "t", "a", "b", student, teacher, ["x"] * len(nats), list(nats))


def test_problems_repeat_and_do_not_leak():
    train, held_out = problems.make_problems(40, 12, 3)
    again = problems.make_problems(40, 12, 3)
    other = problems.make_problems(40, 12, 4)
    texts = [problem.text for problem in train]
    assert texts == [problem.text for problem in again[0]]
    assert texts != [problem.text for problem in other[0]]
    assert (len(set(texts)), len({problem.text for problem in held_out})) == (40, 12)
    assert not set(texts) & {problem.text for problem in held_out}


def test_problems_come_again_where_the_generators_have_no_more(monkeypatch):
    monkeypatch.setattr(problems, "GENERATORS", {"products": problems.GENERATORS["chain_sum"]})
    train, held_out = problems.make_problems(150, 10, 0)
    texts = [problem.text for problem in train]
    different = len(set(texts))
    assert (len(texts), len(held_out)) == (150, 10)
    assert different <= 90  # of a hundred products of two digits
    assert texts[different:] == texts[: 150 - different]


@pytest.mark.parametrize(
    ("response", "right"),
    [("8 + 4 = 12.", True), ("12", True), ("The answer is 12, not 13.", False), ("", False), ("twelve", False), ("-12", False)],
)
def test_the_scorer_judges_the_last_number(response, right):
    train, _ = problems.make_problems(200, 1, 0)
    problem = next(each for each in train if each.answer == "12")
    assert problem.is_right(response) is right


def test_the_context_is_the_teachers_alone():
    words = tokenizer()
    (item,) = [context._item(words, "Name three fruits.")]
    method = context.ContextDistillation.__new__(context.ContextDistillation)
    method.tokenizer = words
    (teacher,) = method.teacher_prompts([item], [])
    assert words.decode(item.prompt) == "Name three fruits.\n"
    text = words.decode(teacher)
    assert text.startswith(context.SYSTEM + "\n")
    assert text.endswith("Aye!\nName three fruits.\n")
    assert not set(prompts.HELD_OUT_CHAT) & {*prompts.CHAT, *(question for question, _ in context.EXAMPLES)}
    assert (item.is_right(" Ahoy! Figs. Aye!"), item.is_right("Figs. Ahoy!")) == (True, False)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (solving.SelfDistillation, "1 + 1?\nThe right answer is 2. Answer in one short sentence.\n"),
        (
            solving.Refinement,
            "1 + 1?\n\nA student's answer: It is 3.\n\nThe right answer is 2. Write the student's answer again, with its "
            "errors corrected. Answer in one short sentence.\n",
        ),
    ],
)
def test_what_the_teacher_of_a_problem_reads(kind, text):
    words = tokenizer()
    method = kind.__new__(kind)
    method.tokenizer, method.chat = words, False
    item = paired.Item("1 + 1?", [1], bool, "2")
    (prompt,) = method.teacher_prompts([item], ["It is 3."])
    assert words.decode(prompt) == text


class _Refining(paired.PairedMethod):
    """A method whose models say what they are told to."""

    refines = True

    def __init__(self) -> None:
        self.tokenizer, self.settings, self.student = tokenizer(), Settings(), "student"
        self.objective = type("Objective", (), {"teacher": "teacher"})()

    def teacher_prompts(self, items, rollouts):
        return [[7, 8, 9]] * len(items)

    def _answers(self, model, prompts, tokens, sampling):
        said = {"student": ([[1, 2], [3]], ["ab", "c"]), "teacher": ([[4, 5, 0], [0]], ["de", " "])}
        return paired.Answers(*said[model])


def test_the_response_is_the_refined_answer_and_an_empty_one_is_no_lesson():
    items = [paired.Item("one", [6], bool), paired.Item("two", [6, 6], bool)]
    exchange = _Refining()._exchange(items, 3, {})
    pairs = exchange.pairs
    assert [ids[kept].tolist() for ids, kept in zip(pairs["input_ids"], pairs["response_mask"], strict=True)] == [[4, 5, 0], []]
    assert pairs["teacher_input_ids"][0].tolist() == [7, 8, 9, 4, 5, 0]
    assert exchange.rollouts.texts == ["ab", "c"]
    assert exchange.refined is not None


def test_verdicts_are_counted_by_both_sides():
    evaluation = evaluation_of(1.0, [row(True, True), row(False, True), row(False, True), row(False, False)], 0.5)
    assert evaluation.table() == [[1, 0], [2, 1]]
    numbers = {name: value for name, value in evaluation.numbers().items() if "answers_" not in name}
    assert numbers == {
        "held_out_kl": 1.0,
        "held_out_right": 0.25,
        "held_out_teacher_right": 0.75,
        "held_out_control": 0.5,
    }


def test_a_wrong_answer_with_a_right_refinement_is_shown_first():
    before = evaluation_of(1.0, [row(True, True), row(False, False), row(False, True), row(False, True)])
    after = evaluation_of(1.0, [row(True, True), row(False, False), row(False, True), row(True, True)])
    assert paired_report.shown(before, after) == [3, 2, 0, 1]


def test_a_share_has_a_standard_error_also_where_all_agree():
    assert standard_error(0.5, 96) == pytest.approx(0.05)
    assert standard_error(0.0, 12) == pytest.approx((0.125 * 0.875 / 16) ** 0.5)


def test_the_outcome_has_its_control():
    before = evaluation_of(2.0, [row(False, True)] * 4, 0.25)
    header, rows = paired_report.outcome(Run("trd", 5, [], before, evaluation_of(1.0, [row(True, True)] * 4)))
    assert header == ("4 held-out questions", "before", "after 5 steps")
    assert rows[1] == ("control: untrained, another draw", "25% ± 17", "")
    assert rows[3:] == [
        ("forward KL, nats per token", "2.00", "1.00"),
        ("student: answers that end by themselves", "75%", "75%"),
        ("student: repeated 3-grams", "25%", "25%"),
        ("refined: repeated 3-grams", "0%", "0%"),
    ]


def test_coloured_tokens_are_text_whatever_they_hold():
    assert coloured(["<b>", ' "\n\x1b'], [0.0, 2.0]) == (
        '<span style="--heat:0.00" title="0.00 nats">&lt;b&gt;</span>'
        '<span style="--heat:0.63" title="2.00 nats"> &quot;↵·</span>'
    )


def test_prompts_of_unequal_length_are_padded_on_the_left():
    from topd_demo.prompts import padded

    ids, attended = padded([[5], [6, 7]], torch.device("cpu"))
    assert (ids.tolist(), attended.tolist()) == ([[0, 5], [6, 7]], [[0, 1], [1, 1]])
