"""How a model words its answers, and whether they have collapsed into repeats or into next to nothing.

A reverse KL falls where the student learns, and also where it says the same few words that the teacher finds likely. These
numbers tell the two apart; the teacher's own answers are their control.
"""

from dataclasses import asdict, dataclass
from typing import Any

GRAM = 3  # tokens
MORE_REPEATS = 0.2  # share of repeated 3-grams above the teacher's own, from which answers count as collapsed
LEAST_LENGTH = 0.25  # of the teacher's mean length, below which they do


@dataclass
class Wording:
    """How answers are worded. Their end tokens count in `ended` and `teacher_perplexity` alone.

    Attributes:
        repeated: the share of 3-grams that stood in the same answer before.
        distinct: an answer's distinct tokens, summed over the answers, by all their tokens.
        length: tokens of an answer, the mean.
        ended: the share of answers that end by themselves, before they are cut.
        teacher_perplexity: exp of the teacher's mean negative log-probability of the tokens; None: not measured.
    """

    repeated: float
    distinct: float
    length: float
    ended: float
    teacher_perplexity: float | None = None

    def numbers(self) -> dict[str, float]:
        """Return what a record holds of it."""
        return {f"answers_{name}": value for name, value in asdict(self).items() if value is not None}


def end_tokens_of(model: Any) -> set[int]:
    """Return the tokens that end a model's answers."""
    ends = model.generation_config.eos_token_id
    return set(ends) if isinstance(ends, list) else {ends}


def wording(answers: list[list[int]], ends: set[int], teacher_perplexity: float | None = None) -> Wording:
    """Return how answers are worded: token ids, at the end of each its end token where it has one."""
    bodies = [ids[:-1] if ids and ids[-1] in ends else ids for ids in answers]
    grams = [[tuple(ids[i : i + GRAM]) for i in range(len(ids) - GRAM + 1)] for ids in bodies]
    repeats, all_grams = sum(len(each) - len(set(each)) for each in grams), sum(map(len, grams))
    tokens, ended = sum(map(len, bodies)), sum(map(len, answers)) - sum(map(len, bodies))
    return Wording(
        repeated=repeats / max(all_grams, 1),
        distinct=sum(len(set(ids)) for ids in bodies) / max(tokens, 1),
        length=tokens / max(len(answers), 1),
        ended=ended / max(len(answers), 1),
        teacher_perplexity=teacher_perplexity,
    )


def collapse(student: Wording, teacher: Wording) -> str:
    """Return how the student's answers have collapsed, beside the teacher's own; empty where they have not."""
    if student.repeated > teacher.repeated + MORE_REPEATS:
        return f"{student.repeated:.0%} of their {GRAM}-grams are repeats, of the teacher's {teacher.repeated:.0%}"
    if student.length < LEAST_LENGTH * teacher.length:
        return f"they have {student.length:.1f} tokens, the teacher's {teacher.length:.1f}"
    return ""


def warning(name: str, reason: str, divergence: str) -> str:
    """Return the sentence that the answers after a method are collapsed, which lowers this divergence too."""
    return f"Warning: after {name} the answers are collapsed: {reason}. A lower {divergence} then says nothing about learning."


def held(names: list[str]) -> str:
    """Return the sentence that the answers after these methods are not collapsed, with the rule; empty where there are none."""
    if not names:
        return ""
    rule = f"at most {MORE_REPEATS * 100:.0f} percentage points more of their {GRAM}-grams are repeats than of the teacher's"
    long = f"they have at least {LEAST_LENGTH:.0%} of the teacher's tokens"
    return f"After {' and '.join(names)} the answers are not collapsed: {rule}, and {long}."
