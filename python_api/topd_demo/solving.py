"""OPSD and TRD on problems with answers: the teacher reads the right answer, or the student's attempt too and mends it."""

from contextlib import AbstractContextManager
from typing import Any

import topd
from topd.trd import Templates, student_prompt, teacher_prompt
from topd_demo.models import Models
from topd_demo.paired import Item, Items, PairedMethod
from topd_demo.problems import Problem, make_problems
from topd_demo.settings import Settings

# Short words: a model of 135 M parameters loses the thread of the longer ones that are topd's own.
WORDS = Templates(
    student="{problem}",
    reference="{problem}\nThe right answer is {reference}. Answer in one short sentence.",
    refine="{problem}\n\nA student's answer: {rollout}\n\nWrite the student's answer again, with its errors corrected.",
    refine_with_reference="{problem}\n\nA student's answer: {rollout}\n\nThe right answer is {reference}. Write the student's "
    "answer again, with its errors corrected. Answer in one short sentence.",
)
SAMPLING = {"temperature": 0.6, "top_p": 0.95, "top_k": 20}  # arXiv 2606.08432, Table 9


class _Solving(PairedMethod):
    """A student that solves problems."""

    def __init__(self, student: Any, objective: topd.OPD, tokenizer: Any, vocabulary: int, settings: Settings) -> None:
        self.chat = tokenizer.chat_template is not None
        self.tokenizer = tokenizer
        train, held_out = make_problems(settings.steps * settings.batch, settings.held_out, settings.seed)
        items = Items([self._item(problem) for problem in train], [self._item(problem) for problem in held_out])
        super().__init__(student, objective, tokenizer, vocabulary, items, settings, SAMPLING, SAMPLING)

    def _item(self, problem: Problem) -> Item:
        prompt = student_prompt(problem.text, templates=WORDS).ids(self.tokenizer, chat=self.chat)
        return Item(problem.text, prompt, problem.is_right, problem.answer)


class SelfDistillation(_Solving):
    """OPSD: the student with a LoRA; its own teacher, with the adapter off, reads the right answer."""

    name = "opsd"

    def __init__(self, models: Models, settings: Settings) -> None:
        objective = topd.OPSD(models.student, topd.OPSDConfig("forward_kl"))  # the paper's clip per entry: docs/demo.md
        self._teaching = objective.teaching
        super().__init__(models.student, objective, models.tokenizer, models.common_vocabulary, settings)

    def teacher_prompts(self, items: list[Item], _rollouts: list[str]) -> list[list[int]]:
        """Return the problem and its answer."""
        prompts = [teacher_prompt(item.text, "reference", reference=item.reference, templates=WORDS) for item in items]
        return [prompt.ids(self.tokenizer, chat=self.chat) for prompt in prompts]

    def teacher(self) -> AbstractContextManager[Any]:
        """Return the context of the student with its adapter off."""
        return self._teaching()


class Refinement(_Solving):
    """TRD: the teacher reads the right answer and the student's attempt, mends it, and the student learns what came of it."""

    name = "trd"
    refines = True

    def __init__(self, models: Models, settings: Settings) -> None:
        objective = topd.TRD(models.student, models.teacher, allow_unequal_vocabularies=True)  # padding may differ
        super().__init__(models.student, objective, models.tokenizer, models.common_vocabulary, settings)

    def teacher_prompts(self, items: list[Item], rollouts: list[str]) -> list[list[int]]:
        """Return the problem, the student's attempt and the right answer."""
        prompts = [
            teacher_prompt(item.text, "refine", rollout=rollout, reference=item.reference, templates=WORDS)
            for item, rollout in zip(items, rollouts, strict=True)
        ]
        return [prompt.ids(self.tokenizer, chat=self.chat) for prompt in prompts]
