"""How answers are worded, by hand; when they count as collapsed; what is said of it."""

import pytest

from topd_demo.evaluation import Evaluation, Transcript
from topd_demo.summary import summarise
from topd_demo.training import Run
from topd_demo.wording import Wording, collapse, wording

END = 0


def test_repeats_are_counted_within_an_answer():
    answers = [[1, 2, 3, 1, 2, 3, 1, END], [1, 2, 3, 4]]  # 5 + 2 3-grams, 123 and 231 come again; 3 + 4 of 11 tokens distinct
    assert wording(answers, {END}, 2.5) == Wording(2 / 7, 7 / 11, 5.5, 0.5, 2.5)


def test_the_same_token_over_and_over():
    assert wording([[7] * 12], {END}, 1.1) == Wording(9 / 10, 1 / 12, 12.0, 0.0, 1.1)


@pytest.mark.parametrize(("answers", "length", "ended"), [([[END], [END]], 0.0, 1.0), ([[5], [END]], 0.5, 0.5), ([], 0.0, 0.0)])
def test_answers_without_a_3_gram(answers, length, ended):
    assert (worded := wording(answers, {END}, 1.0)).repeated == 0
    assert (worded.length, worded.ended) == (length, ended)


def test_a_model_without_an_end_token_never_ends():
    assert wording([[1, 2]], {None}, 1.0).ended == 0


def worded(repeated: float, length: float) -> Wording:
    return Wording(repeated, 0.8, length, 0.5, 3.0)


@pytest.mark.parametrize(
    ("student", "reason"),
    [
        (worded(0.30, 20), ""),  # 0.20 above the teacher's, not more
        (worded(0.31, 20), "31% of their 3-grams are repeats, of the teacher's 10%"),
        (worded(0.90, 0), "90% of their 3-grams are repeats, of the teacher's 10%"),
        (worded(0.00, 5), ""),
        (worded(0.00, 4.9), "they have 4.9 tokens, the teacher's 20.0"),
    ],
)
def test_the_rule_of_a_collapse(student, reason):
    assert collapse(student, worded(0.10, 20)) == reason


def run(method: str, after: Wording) -> Run:
    before = Evaluation(2.0, transcript("b", worded(0.5, 20)), transcript("t", worded(0.1, 20)))
    return Run(method, 3, [], before, Evaluation(1.0, transcript(method, after)))


def transcript(answer: str, worded: Wording) -> Transcript:
    return Transcript([["first", answer + "1"], ["second", answer + "2"]], worded)


def test_the_summary_warns_of_a_collapse_alone():
    summary = summarise([run("opd", worded(0.05, 19)), run("topd", worded(0.8, 20))], None)
    assert summary.repeats == "Repeated 3-grams: before 50%, after OPD 5%, after TOPD 80%, teacher 10%"
    (warning,) = summary.warnings
    assert warning.startswith("Warning: after TOPD the answers are collapsed: 80% of their 3-grams are repeats")
    assert summary.held.startswith("After OPD the answers are not collapsed: at most 20 percentage points more of")
    nothing = summarise([], None)
    assert (nothing.warnings, nothing.held) == ([], "")


def test_the_summary_says_so_where_nothing_is_collapsed():
    summary = summarise([run("opd", worded(0.05, 19)), run("topd", worded(0.1, 20))], None)
    assert summary.warnings == []
    assert summary.held.startswith("After OPD and TOPD the answers are not collapsed: ")
    assert summary.held.endswith("and they have at least 25% of the teacher's tokens.")


def test_the_summary_holds_nothing_where_all_is_collapsed():
    summary = summarise([run("opd", worded(0.9, 19))], None)
    assert len(summary.warnings) == 1
    assert summary.held == ""


def test_the_summary_puts_the_answers_beside_the_teachers():
    summary = summarise([run("opd", worded(0.05, 19))], None)
    assert summary.samples == [
        ("first", {"before": "b1", "after OPD": "opd1", "teacher": "t1"}),
        ("second", {"before": "b2", "after OPD": "opd2", "teacher": "t2"}),
    ]
    assert [row[0] for row in summary.wordings[1]] == ["before", "after OPD", "teacher"]
    assert summary.wordings[1][1] == ("after OPD", "5%", "80%", "19.0", "50%", "3.0")
