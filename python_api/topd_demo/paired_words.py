"""What a report says of each method whose teacher reads another prompt."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Words:
    """A method in words; all of it is HTML.

    Attributes:
        heading, note: the page's title; what its first numbers are.
        right, right_answers: what an answer that counts is called, and such answers.
        teacher: what the teacher says.
        said, tokens_are: what stands under the two headings.
    """

    heading: str
    note: str
    right: str
    right_answers: str
    teacher: str
    said: str
    tokens_are: str


_RIGHT = "reasoning-gym's scorer judges the last number of an answer. A share of n answers has a standard error, ±; "
_CONTROL = (
    "the control is the untrained student once more, drawn from another seed: what lies between the two draws is chance alone."
)

WORDS = {
    "trd": Words(
        "Trajectory-refined distillation",
        f"{_RIGHT}{_CONTROL} Forward KL is measured on the refined answers.",
        "right",
        "right answers",
        "refined",
        "Each time the student answers first. The teacher reads the answer and the right result beside the problem, and writes "
        "the answer again. The student learns what the teacher wrote.",
        "The refined answer, which both sides read: the teacher behind problem, attempt and right result, the student behind "
        "the problem alone.",
    ),
    "opsd": Words(
        "On-policy self-distillation",
        f"{_RIGHT}{_CONTROL} Forward KL is measured on the student's own answers.",
        "right",
        "right answers",
        "teacher",
        "The teacher is the same model before training. It has read the right result, the student has not.",
        "The student's own answer, which both sides read: the teacher behind problem and right result, the student behind the "
        "problem alone.",
    ),
    "context": Words(
        "Context distillation",
        "Answers are the most likely ones, token by token, to questions that the student is not trained on. Forward KL is "
        "measured on these answers. An answer is in the manner of the teacher where it begins with “Ahoy!”.",
        "in the manner",
        "answers in the manner",
        "teacher",
        "The teacher reads a system prompt and four example turns before the question; the student reads the question alone, "
        "before training and after. An answer that begins with “Ahoy!” counts as in the manner.",
        "The student's own answer, which both sides read: the teacher behind system prompt, examples and question, the "
        "student behind the question alone.",
    ),
}
