"""Read a run's file as token ids of student and teacher."""

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from topd.checks.values import choice, positive_int
from topd.trd.problems import USABLE
from topd.trd.prompts import (
    CONTEXTS,
    STUDENT_OPTIONS,
    TEACHER_OPTIONS,
    Context,
    PromptTooLongError,
    student_prompt,
    teacher_prompt,
)
from topd.trd.records import read_run
from topd.trd.templates import Templates

Select = Literal["all", "fail", "succ", "fail_to_succ"]
SELECTIONS: tuple[str, ...] = get_args(Select)
RESPONSES = ("rollout", "refined")
MAX_LENGTH, MAX_LENGTH_WITH_REFERENCE = 34_816, 38_912
NAMED = 3  # ids in a warning


@dataclass
class TokenPairs:
    """Rows whose student and teacher read different prompts and the same response, as lists of token ids.

    Attributes:
        ids: the records' ids.
        prompts, teacher_prompts: what each side reads before the response.
        responses: the response, tokenized once; its end token where it ended by itself.
        verdicts: of the responses; None where unknown.
        rollout_verdicts: of the rollouts y_o that the responses come from; the same for responses that are rollouts.
        notices: what was cut off from the teacher's prompt, in words; "" where nothing was.
    """

    ids: list[str] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)
    teacher_prompts: list[list[int]] = field(default_factory=list)
    responses: list[list[int]] = field(default_factory=list)
    verdicts: list[bool | None] = field(default_factory=list)
    rollout_verdicts: list[bool | None] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


def batches(
    path: str | Path,
    tokenizer: Any,
    context: Context,
    max_length: int | None = None,
    select: Select = "all",
    *,
    batch_size: int = 8,
    response: Literal["rollout", "refined"] | None = None,
    with_reference: bool | None = None,
    student_options: Mapping[str, Any] | None = None,
    teacher_options: Mapping[str, Any] | None = None,
    end_token_id: int | None = None,
) -> Iterator[TokenPairs]:
    """Return the pairs of a run's file, in its order, `batch_size` at a time; the last may be smaller.

    Task, words and chat are those of the file. Only responses with the status "ok" or "length" are taken.

    Args:
        path: of a file that `generate` wrote.
        tokenizer: of student and teacher both.
        context: what the teacher reads beside the problem: "plain" nothing, "reference" the reference solution, "refine" the
            rollout.
        max_length: > 0, the most tokens of a prompt and its response, on either side. None: 34,816; where the teacher reads a
            reference 38,912. The teacher's prompt is cut to it as `teacher_prompt` does, and to the run's max_prompt_tokens;
            the response never. A pair that is too long all the same is left out; a warning at the end says how many were.
        select: by the verdict of the rollout: "fail", "succ"; "fail_to_succ", the rollout wrong and its refinement right.
        batch_size: > 0.
        response: "rollout", y_o, or "refined", y_r. None: what the file's stage made.
        with_reference: in the context "refine" the teacher reads the reference too. None: as when the file was made.
        student_options, teacher_options: for the chat template. None: those of the run for the side that it asked, else
            {"enable_thinking": False} for the student; for the teacher True, and in the context "plain" the student's.
        end_token_id: None: the tokenizer's eos_token_id. With chat=False there is none.

    Raises:
        TypeError, ValueError: a wrong option; a file without what is asked for.
    """
    settings, records = read_run(path)
    refined = settings["stage"] == "refine"
    choice("context", context, CONTEXTS)
    choice("select", select, SELECTIONS)
    positive_int("batch_size", batch_size)
    wanted = choice("response", response or ("refined" if refined else "rollout"), RESPONSES)
    if not refined and (wanted == "refined" or select == "fail_to_succ"):
        what = "response='refined'" if wanted == "refined" else "select='fail_to_succ'"
        raise ValueError(f"{what} needs a file of stage 'refine', got {Path(path).name} of stage {settings['stage']!r}")
    if with_reference is None:
        with_reference = bool(settings["with_reference"])
    with_reference = context == "reference" or (context == "refine" and with_reference)
    if max_length is None:
        max_length = MAX_LENGTH_WITH_REFERENCE if with_reference else MAX_LENGTH
    own = settings["template_options"]
    student = student_options if student_options is not None else STUDENT_OPTIONS if refined else own
    if teacher_options is None:
        teacher_options = student if context == "plain" else own if refined else TEACHER_OPTIONS
    end = getattr(tokenizer, "eos_token_id", None) if end_token_id is None else end_token_id
    if settings["chat"] and end is None:
        raise ValueError("tokenizer has no eos_token_id; pass the id that ends a response as end_token_id")
    tokens = _Tokens(
        tokenizer=tokenizer,
        settings=settings,
        context=context,
        max_length=positive_int("max_length", max_length),
        with_reference=with_reference,
        student_options=student,
        teacher_options=teacher_options,
        end=end if settings["chat"] else None,
    )
    return _batches(Path(path), records, tokens, select, wanted, refined, batch_size)


def _batches(
    path: Path,
    records: Iterator[dict[str, Any]],
    tokens: "_Tokens",
    select: str,
    response: str,
    refined: bool,
    batch_size: int,
) -> Iterator[TokenPairs]:
    pairs, left_out, verdicts = TokenPairs(), list[str](), 0
    for record in records:
        usable = record["status"] in USABLE
        first, second = (record.get("rollout_verdict"), record["verdict"]) if refined else (record["verdict"], None)
        verdicts += first is not None
        if not usable or not _selected(select, first, second):
            continue
        of_rollout = refined and response == "rollout"
        text = record["rollout"] if of_rollout else record["text"]
        ended = (record.get("rollout_status") if of_rollout else record["status"]) == "ok"
        row = tokens.row(record, text, ended, record["rollout"] if refined else text)
        if row is None:
            left_out.append(record["id"])
            continue
        prompt, teacher, answer, notice = row
        pairs.ids.append(record["id"])
        pairs.prompts.append(prompt)
        pairs.teacher_prompts.append(teacher)
        pairs.responses.append(answer)
        pairs.verdicts.append(second if refined and response == "refined" else first)
        pairs.rollout_verdicts.append(first)
        pairs.notices.append(notice)
        if len(pairs.ids) == batch_size:
            yield pairs
            pairs = TokenPairs()
    if select != "all" and not verdicts:
        raise ValueError(f"select={select!r} needs verdicts of the rollouts, and {path.name} has none; generate with verify=")
    if pairs.ids:
        yield pairs
    if left_out:
        names = ", ".join(map(repr, left_out[:NAMED])) + (", ..." if len(left_out) > NAMED else "")
        warnings.warn(
            f"{len(left_out)} of {path.name}'s responses were left out: with their prompts they exceed "
            f"max_length={tokens.max_length} ({names})",
            stacklevel=2,
        )


def _selected(select: str, rollout: bool | None, refined: bool | None) -> bool:
    if select == "all":
        return True
    if select == "succ":
        return rollout is True
    return rollout is False and (select == "fail" or refined is True)


@dataclass(frozen=True)
class _Tokens:
    """How a record becomes token ids."""

    tokenizer: Any
    settings: Mapping[str, Any]
    context: Context
    max_length: int
    with_reference: bool
    student_options: Mapping[str, Any]
    teacher_options: Mapping[str, Any]
    end: int | None

    def row(
        self, record: Mapping[str, Any], text: str, ended: bool, rollout: str
    ) -> tuple[list[int], list[int], list[int], str] | None:
        """Return the student's prompt, the teacher's, the response, and what was cut; None where they are too long."""
        task, chat = self.settings["task"], self.settings["chat"]
        words = Templates(**self.settings["templates"])
        if self.with_reference and record.get("reference") is None:
            raise ValueError(f"the record {record['id']!r} has no reference, which context={self.context!r} reads here")
        response = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if ended and self.end is not None:
            response.append(self.end)
        room = self.max_length - len(response)
        prompt = student_prompt(record["problem"], task, templates=words)
        student = prompt.ids(self.tokenizer, chat=chat, options=self.student_options)
        if len(student) > room:
            return None
        own = self.settings["max_prompt_tokens"] if self.settings["stage"] == "refine" else None
        try:
            teacher = teacher_prompt(
                record["problem"],
                self.context,
                rollout=rollout if self.context == "refine" else None,
                reference=record["reference"] if self.with_reference else None,
                task=task,
                templates=words,
                tokenizer=self.tokenizer,
                budget=room if own is None or self.context != "refine" else min(room, own),
                chat=chat,
                options=self.teacher_options,
            )
        except PromptTooLongError:
            return None
        ids = teacher.ids(self.tokenizer, chat=chat, options=self.teacher_options)
        return student, ids, response, teacher.notice
