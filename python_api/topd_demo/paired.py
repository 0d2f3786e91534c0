"""Methods whose teacher reads another prompt before the same response: how pairs come about, how the student is judged."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import topd
from topd.integrations.rollouts import sample_rollouts
from topd_demo.prompts import padded
from topd_demo.settings import Settings
from topd_demo.window_pair import WindowPair
from topd_demo.wording import Wording, end_tokens_of, wording


@dataclass(frozen=True)
class Item:
    """A question.

    Attributes:
        text: as a report shows it.
        prompt: what the student reads, token ids.
        is_right: whether the text of an answer is right.
        reference: the right answer; "" where there is none.
    """

    text: str
    prompt: list[int]
    is_right: Callable[[str], bool]
    reference: str = ""


class Items(NamedTuple):
    """The questions of a run: `steps * batch` to train on, and others to be judged by."""

    train: list[Item]
    held_out: list[Item]


@dataclass
class Row:
    """A held-out question, and what both sides say.

    Attributes:
        question, reference: as of the item.
        student_reads, teacher_reads: their prompts as text.
        student: the student's answer.
        teacher: what the teacher, with its own prompt, says: an answer, or the student's answer refined.
        student_right, teacher_right: whether these are right.
        tokens, nats: of the response that both sides read: its tokens as text, and KL(p_T || p_S) at each.
    """

    question: str
    reference: str
    student_reads: str
    teacher_reads: str
    student: str
    teacher: str
    student_right: bool
    teacher_right: bool
    tokens: list[str]
    nats: list[float]


@dataclass
class PairedEvaluation:
    """How the student stood beside its teacher on the held-out questions.

    Attributes:
        forward_kl: KL(p_T || p_S), the mean over the tokens of the responses, nats; never clipped.
        rows: a question each.
        student_wording, teacher_wording: how the student's answers are worded, and what the teacher says.
        control: the share of right answers of the same student drawn once more, from another seed; None: not drawn.
    """

    forward_kl: float
    rows: list[Row]
    student_wording: Wording
    teacher_wording: Wording
    control: float | None = None

    def numbers(self) -> dict[str, float]:
        """Return what a record holds of it."""
        values = {"held_out_kl": self.forward_kl, "held_out_right": self.right, "held_out_teacher_right": self.teacher_right}
        values |= self.student_wording.numbers()
        values |= {f"teacher_{name}": value for name, value in self.teacher_wording.numbers().items()}
        return values if self.control is None else values | {"held_out_control": self.control}

    @property
    def right(self) -> float:
        """The share of the student's answers that are right."""
        return _share([row.student_right for row in self.rows])

    @property
    def teacher_right(self) -> float:
        """The share of what the teacher says that is right."""
        return _share([row.teacher_right for row in self.rows])

    def table(self) -> list[list[int]]:
        """Return the counts of verdicts: rows by the student, columns by the teacher, right first."""
        verdicts = [(row.student_right, row.teacher_right) for row in self.rows]
        return [[verdicts.count((student, teacher)) for teacher in (True, False)] for student in (True, False)]


class Answers(NamedTuple):
    """Answers as token ids, with their end tokens, and as texts."""

    ids: list[list[int]]
    texts: list[str]


class Exchange(NamedTuple):
    """What was said to some questions.

    Attributes:
        rollouts: of the student, token ids and texts.
        teacher_prompts: what the teacher reads, token ids.
        refined: of the teacher, which read the rollouts; None where it refines nothing.
        pairs: the batch.
    """

    rollouts: Answers
    teacher_prompts: list[list[int]]
    refined: Answers | None
    pairs: dict[str, Tensor]


class PairedMethod(ABC):
    """A student that reads the question, a teacher that reads more, one response.

    Args:
        vocabulary: the tokens that both models have.
        sampling: how answers are drawn in training, as of `sample_rollouts`.
        held_out_sampling: how they are drawn to judge.

    Attributes:
        refines: whether the response is what the teacher made of the student's answer, and not that answer.
    """

    name: str
    refines = False
    evaluation_type: type = PairedEvaluation

    def __init__(
        self,
        student: Any,
        objective: topd.OPD,
        tokenizer: Any,
        vocabulary: int,
        items: Items,
        settings: Settings,
        sampling: dict[str, Any],
        held_out_sampling: dict[str, Any],
    ) -> None:
        self.student, self.tokenizer, self.vocabulary = student, tokenizer, vocabulary
        self.objective: topd.OPD | topd.TOPD = objective
        (self.train, self.held_out), self.settings = items, settings
        self.sampling, self.held_out_sampling = sampling, held_out_sampling
        self.known_teacher: Answers | None = None

    @abstractmethod
    def teacher_prompts(self, items: list[Item], rollouts: list[str]) -> list[list[int]]:
        """Return what the teacher reads, token ids."""

    def teacher(self) -> AbstractContextManager[Any]:
        """Return the context of the model that speaks for the teacher."""
        return nullcontext(self.objective.teacher)

    def batch(self, index: int) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return a step's pairs, and the share of right answers among them."""
        items = self.train[index * self.settings.batch : (index + 1) * self.settings.batch]
        exchange = self._exchange(items, self.settings.tokens, self.sampling)
        right = _verdicts(items, exchange.rollouts)
        numbers = {"rollouts_right": _share(right)}
        if exchange.refined is not None:
            numbers["refined_right"] = _share(_verdicts(items, exchange.refined))
        verdict = torch.tensor(right, device=torch.device(self.settings.device))
        return {**exchange.pairs, "verdict": verdict}, numbers

    @torch.no_grad()
    def evaluate(self, first: bool) -> PairedEvaluation:
        """Judge answers to the held-out questions, drawn from the same seed every time; at first also from another one."""
        items, seed = self.held_out, self.settings.seed
        tokens, sampling = self.settings.held_out_tokens, self.held_out_sampling
        torch.manual_seed(seed)
        exchange = self._exchange(items, tokens, sampling)
        said = exchange.refined or self._teacher_answers()
        rows = self._rows(exchange, said)
        with self.teacher() as teacher:
            wordings = wording(exchange.rollouts.ids, end_tokens_of(self.student)), wording(said.ids, end_tokens_of(teacher))
        nats = [value for row in rows for value in row.nats]
        control = None
        if first and sampling.get("temperature") != 0:
            torch.manual_seed(seed + 1)
            control = _share(_verdicts(items, self._answers(self.student, [item.prompt for item in items], tokens, sampling)))
        return PairedEvaluation(sum(nats) / max(len(nats), 1), rows, *wordings, control)

    def _rows(self, exchange: Exchange, said: Answers) -> list[Row]:
        """Return what both sides say to the held-out questions, and how far apart they are at each token of the responses."""
        scores, pairs = self.objective(exchange.pairs).scores.forward_kl, exchange.pairs
        rows = []
        for place, (item, mine, theirs) in enumerate(zip(self.held_out, exchange.rollouts.texts, said.texts, strict=True)):
            response = pairs["response_mask"][place]
            ids, reads = pairs["input_ids"][place], exchange.teacher_prompts[place]
            rows.append(
                Row(
                    question=item.text,
                    reference=item.reference,
                    student_reads=self.tokenizer.decode(item.prompt),
                    teacher_reads=self.tokenizer.decode(reads),
                    student=mine,
                    teacher=theirs,
                    student_right=item.is_right(mine),
                    teacher_right=item.is_right(theirs),
                    tokens=[self.tokenizer.decode([token]) for token in ids[response].tolist()],
                    nats=scores[place][response].tolist(),
                )
            )
        return rows

    def window_pair(self, _objective: topd.Objective, _batch: dict[str, Tensor]) -> WindowPair | None:
        """Return None: there are no windows."""
        return None

    def _exchange(self, items: list[Item], tokens: int, sampling: dict[str, Any]) -> Exchange:
        """Let the student answer, and pair its prompts and the teacher's with the response."""
        prompts = [item.prompt for item in items]
        rollouts = self._answers(self.student, prompts, tokens, sampling)
        teacher_prompts, refined = self.teacher_prompts(items, rollouts.texts), None
        responses = rollouts.ids
        if self.refines:
            with self.teacher() as teacher:
                refined = self._answers(teacher, teacher_prompts, tokens, sampling)
            responses = [ids if text.strip() else [] for ids, text in zip(*refined, strict=True)]  # nothing is no lesson
        pairs = topd.pair(prompts, teacher_prompts, responses, self.tokenizer.eos_token_id)
        device = torch.device(self.settings.device)
        return Exchange(rollouts, teacher_prompts, refined, {key: value.to(device) for key, value in pairs.items()})

    def _teacher_answers(self) -> Answers:
        """Return the teacher's own answers to the held-out questions: always the same."""
        if self.known_teacher is None:
            torch.manual_seed(self.settings.seed)
            prompts = self.teacher_prompts(self.held_out, [])
            with self.teacher() as teacher:
                self.known_teacher = self._answers(teacher, prompts, self.settings.held_out_tokens, self.held_out_sampling)
        return self.known_teacher

    def _answers(self, model: Any, prompts: list[list[int]], tokens: int, sampling: dict[str, Any]) -> Answers:
        """Let a model answer prompts."""
        ids, attended = padded(prompts, torch.device(self.settings.device))
        batch = sample_rollouts(model, ids, attended, max_new_tokens=tokens, vocabulary=self.vocabulary, **sampling)
        answers = [row[kept].tolist() for row, kept in zip(batch["input_ids"], batch["response_mask"], strict=True)]
        return Answers(answers, [self.tokenizer.decode(each, skip_special_tokens=True) for each in answers])


def _verdicts(items: list[Item], answers: Answers) -> list[bool]:
    """Return which of the answers are right."""
    return [item.is_right(text) for item, text in zip(items, answers.texts, strict=True)]


def _share(verdicts: list[bool]) -> float:
    """Return the share that is True."""
    return sum(verdicts) / max(len(verdicts), 1)
