"""The words around a problem: what the student reads, and what the teacher reads beside the problem.

Source: arXiv 2606.08432 for what a refine prompt asks for; the words are ours.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields

from topd.checks.values import choice

FIELD = re.compile(r"\{(problem|rollout|reference)\}")
NEEDED = {
    "student": {"problem"},
    "reference": {"problem", "reference"},
    "refine": {"problem", "rollout"},
    "refine_with_reference": {"problem", "rollout", "reference"},
}


@dataclass(frozen=True)
class Templates:
    """The prompts of one task. `{problem}`, `{rollout}` and `{reference}` stand for the texts; other braces mean nothing.

    Args:
        student: what the student reads, and the teacher in the context "plain"; with {problem}.
        reference: the teacher's context "reference": {problem} and its {reference} solution.
        refine: the teacher's context "refine": {problem} and the student's {rollout}.
        refine_with_reference: the same where the teacher reads the {reference} solution too.
        cut_notice: what stands where the rest of a text was cut off.

    Raises:
        TypeError, ValueError: a template that is no text, or lacks a field or has one that does not belong to it.
    """

    student: str
    reference: str
    refine: str
    refine_with_reference: str
    cut_notice: str = "[The rest was cut off here because it is too long.]"

    def __post_init__(self) -> None:
        for field in fields(self):
            text = getattr(self, field.name)
            if not isinstance(text, str):
                raise TypeError(f"templates.{field.name} must be a string, got {type(text).__name__}")
            named, needed = set(FIELD.findall(text)), NEEDED.get(field.name, set())
            if named != needed:
                rule = f"name {', '.join(f'{{{name}}}' for name in sorted(needed)) or 'no field'}"
                came = ", ".join(f"{{{name}}}" for name in sorted(named)) or "none"
                raise ValueError(f"templates.{field.name} must {rule} and no other field, got {came}")


def filled(template: str, texts: Mapping[str, str]) -> str:
    """Return the template with the texts in place of their fields; a field's name inside a text stays as it is."""
    return FIELD.sub(lambda match: texts[match[1]], template)


_REFINE = """\
Below are a problem and a first solution that a student wrote for it.

Problem:
{problem}

The student's solution:
{rollout}
%s
Rewrite the student's solution so that it becomes correct. Follow the student's own structure and line of reasoning, in the \
same order. Keep each step that is right as it stands. Repair each error of computation or of logic where it occurs, and \
whatever follows from it. Write nothing but the rewritten solution: no remarks about the first one, no list of changes. %s"""

_REFERENCE = """\
Below are a problem and a reference solution of it.

Problem:
{problem}

Reference solution:
{reference}

Understand the reference solution, then solve the problem yourself, step by step and in your own words. %s"""

_REFERENCE_BLOCK = """
A reference solution, to check the student's steps against; do not copy it:
{reference}
"""


def _templates(student: str, ending: str) -> Templates:
    return Templates(
        student=student,
        reference=_REFERENCE % ending,
        refine=_REFINE % ("", ending),
        refine_with_reference=_REFINE % (_REFERENCE_BLOCK, ending),
    )


TASKS = {
    "math": _templates(
        "{problem}\n\nReason step by step, and put the final answer in \\boxed{}.",
        "Put the final answer in \\boxed{}.",
    ),
    "code": _templates(
        "{problem}\n\nThink the problem through, then give the whole program in one ```python block.",
        "Give the whole program in one ```python block.",
    ),
}


def templates_of(task: object, templates: object = None) -> Templates:
    """Return the templates of a task, or the user's own in their place."""
    name = choice("task", task, tuple(TASKS))
    if templates is None:
        return TASKS[name]
    if not isinstance(templates, Templates):
        raise TypeError(f"templates must be a topd.trd.Templates, got {type(templates).__name__}")
    return templates
