"""Rollouts of the student and the teacher's refinements of them, into a file that a stopped run goes on with."""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from topd.checks.values import choice, flag, positive_int, real
from topd.trd.generators import Answer, Request, Sampling, as_generator, status_of
from topd.trd.problems import USABLE, Problem, expanded, read_problems
from topd.trd.progress import Progress
from topd.trd.prompts import STUDENT_OPTIONS, TEACHER_OPTIONS, Prompt, PromptTooLongError, Task, student_prompt, teacher_prompt
from topd.trd.records import Journal, digest
from topd.trd.stopping import StopSignals, stop_signals
from topd.trd.summary import Summary, summary
from topd.trd.templates import Templates, templates_of

Stage = Literal["rollout", "refine"]
STAGES: tuple[str, ...] = get_args(Stage)
Verify = Callable[[Mapping[str, Any], str], bool | None]
MAX_NEW_TOKENS = 16_384
MAX_PROMPT_TOKENS = {"math": 4_096, "code": 2_048}
MAX_REFINE_TOKENS, MAX_REFINE_TOKENS_WITH_REFERENCE = 18_432, 22_528


class _Run(NamedTuple):
    """The options of a run that its prompts depend on."""

    stage: Stage
    task: Task
    templates: Templates
    with_reference: bool
    tokenizer: Any
    max_prompt_tokens: int | None
    sampling: Sampling
    seed: int
    chat: bool
    options: dict[str, Any]


def generate(
    problems: Iterable[Mapping[str, Any]] | str | Path,
    generator: Any,
    path: str | Path,
    stage: Stage = "rollout",
    verify: Verify | None = None,
    *,
    task: Task = "math",
    with_reference: bool = False,
    samples: int = 1,
    temperature: float = 0.6,
    top_p: float = 0.95,
    top_k: int | None = 20,
    max_new_tokens: int = MAX_NEW_TOKENS,
    max_prompt_tokens: int | None = None,
    tokenizer: Any = None,
    chat: bool = True,
    template_options: Mapping[str, Any] | None = None,
    templates: Templates | None = None,
    seed: int = 0,
    retry_failed: bool = False,
    progress: bool = True,
) -> Summary:
    """Have every problem answered, or every rollout refined, and write a record of each to a file.

    A run that was stopped or killed goes on when it is called again with the same file: no record is written twice, no
    finished one is asked for again. Ctrl-C and SIGTERM end it with KeyboardInterrupt and SystemExit, never within a record.

    Args:
        problems: mappings with "problem" and, as needed, "id" (text or an int, unique; else the position), "reference",
            "rollout"; whatever else they hold is kept, and `verify` sees it. Or the path of such a JSONL file, or, for
            "refine", of a run's file with rollouts, of which those with the status "ok" or "length" are taken.
        generator: a function from a `Request` to a text, a `FromModel`, or a `FromServer`.
        path: of the JSONL file: the settings, then a record a line.
        stage: "rollout", the student answers the problem; "refine", the teacher rewrites the rollout.
        verify: (problem, response) -> True, False, or None where it cannot tell; called in this thread, one at a time.
        task: "math" or "code": which words the prompts have.
        with_reference: for "refine": the teacher reads "reference" too.
        samples: > 0, answers to a problem; from 2 on a record's id is "<id>#<number>".
        temperature: >= 0; 0 is greedy.
        top_p: in (0, 1].
        top_k: > 0; None: all tokens.
        max_new_tokens: > 0, room for the answer, beside the prompt's.
        max_prompt_tokens: > 0. A rollout's prompt beyond it is recorded as "too_long"; a refine prompt is cut to it. None:
            4,096 (code 2,048), to refine 18,432, with the reference 22,528. It needs a tokenizer; without one, nothing
            is measured.
        tokenizer: of the model that answers; None: the generator's own, if it has one.
        chat: False: the plain prompt and a newline instead of a chat.
        template_options: further words for the chat template; None: {"enable_thinking": False} for the student's rollouts, True
            for the teacher.
        templates: words of your own instead of ours.
        seed: >= 0; each answer's own seed comes from it and the record's id.
        retry_failed: ask for those with the status "failed" again.
        progress: show a bar, or plain lines where nobody watches.

    Returns:
        The `Summary` of the whole file.

    Raises:
        TypeError, ValueError: a wrong option or problem; a file that has other settings, other problems or a repeated id.
        RuntimeError: another process writes the file.

    Source: arXiv 2606.08432, Table 9, for the defaults.
    """
    path, generator = Path(path), as_generator(generator)
    if tokenizer is None:
        tokenizer = getattr(generator, "tokenizer", None)
    run = _checked_run(
        stage=stage,
        task=task,
        templates=templates,
        with_reference=with_reference,
        tokenizer=tokenizer,
        max_prompt_tokens=max_prompt_tokens,
        sampling=_checked_sampling(temperature, top_p, top_k, max_new_tokens),
        seed=seed,
        chat=chat,
        template_options=template_options,
    )
    items = list(expanded(read_problems(problems, stage, with_reference), positive_int("samples", samples)))
    settings = _settings(run, generator.name, samples)
    with Journal(path, settings, retry_failed=flag("retry_failed", retry_failed)) as journal:
        wanted = _unfinished(items, journal)
        counts = Counter(journal.known[id_].status for id_, _ in items if id_ in journal.known)
        with stop_signals() as signals, Progress(stage, counts, len(items), shown=progress) as shown:
            if journal.cut_bytes:
                shown.say(f"{path}: a torn last line of {journal.cut_bytes:,} bytes was cut off")
            writer = _Writer(run, journal, signals, shown, verify)
            with closing(generator.answers(writer.requests(wanted))) as answers:
                for request, answer in answers:
                    writer.write(request.id, request.prompt, answer)
    return summary(path)


def _checked_sampling(temperature: float, top_p: float, top_k: int | None, max_new_tokens: int) -> Sampling:
    return Sampling(
        real("temperature", temperature, low=0.0, hint="0 is greedy"),
        real("top_p", top_p, low=0.0, high=1.0, open_low=True),
        None if top_k is None else positive_int("top_k", top_k, hint="or None, for all tokens"),
        positive_int("max_new_tokens", max_new_tokens),
    )


def _checked_run(
    *,
    stage: Stage,
    task: Task,
    templates: Templates | None,
    with_reference: bool,
    tokenizer: Any,
    max_prompt_tokens: int | None,
    sampling: Sampling,
    seed: int,
    chat: bool,
    template_options: Mapping[str, Any] | None,
) -> _Run:
    choice("stage", stage, STAGES)
    words = templates_of(task, templates)
    if flag("with_reference", with_reference) and stage != "refine":
        raise ValueError("with_reference is for stage='refine'; the student never reads the reference")
    if max_prompt_tokens is None:
        refined = MAX_REFINE_TOKENS_WITH_REFERENCE if with_reference else MAX_REFINE_TOKENS
        most = refined if stage == "refine" else MAX_PROMPT_TOKENS[task]
        max_prompt_tokens = None if tokenizer is None else most
    elif positive_int("max_prompt_tokens", max_prompt_tokens) and tokenizer is None:
        raise ValueError("max_prompt_tokens counts a tokenizer's tokens; pass the tokenizer of the model that answers")
    if type(seed) is not int or seed != 0:
        positive_int("seed", seed, hint="or 0")
    default = STUDENT_OPTIONS if stage == "rollout" else TEACHER_OPTIONS
    options = dict(default if template_options is None else template_options) if flag("chat", chat) else {}
    if tokenizer is not None:
        Prompt("").rendered(tokenizer, chat=chat, options=options)  # refused before there is a file
    return _Run(stage, task, words, with_reference, tokenizer, max_prompt_tokens, sampling, seed, chat, options)


def _settings(run: _Run, model: str, samples: int) -> dict[str, Any]:
    """Return what must be equal for a run to go on; what only changes its speed is left out."""
    return {
        "stage": run.stage,
        "task": run.task,
        "model": model,
        **dataclasses.asdict(run.sampling),
        "max_prompt_tokens": run.max_prompt_tokens,
        "samples": samples,
        "seed": run.seed,
        "with_reference": run.with_reference,
        "chat": run.chat,
        "template_options": run.options,
        "templates": dataclasses.asdict(run.templates),
    }


def _unfinished(items: list[tuple[str, Problem]], journal: Journal) -> list[tuple[str, Problem]]:
    """Return the items that have no record yet.

    Raises:
        ValueError: the file's record of an id is of another problem.
    """
    wanted = []
    for id_, problem in items:
        known = journal.known.get(id_)
        if known is None:
            wanted.append((id_, problem))
        elif known.digest != digest(problem.texts):
            raise ValueError(f"the problem {id_!r} is another one in {journal.path.name}; take another file")
    return wanted


class _Writer:
    """Makes the requests of a run and the records of their answers."""

    def __init__(self, run: _Run, journal: Journal, signals: StopSignals, shown: Progress, verify: Verify | None) -> None:
        self.run, self.journal, self.signals, self.shown, self.verify = run, journal, signals, shown, verify
        self.asked: dict[str, Problem] = {}

    def requests(self, wanted: list[tuple[str, Problem]]) -> Iterator[Request]:
        """Return a request for each; a prompt that is too long becomes its record at once."""
        run = self.run
        for id_, problem in wanted:
            self.asked[id_] = problem
            try:
                prompt = self._prompt(problem)
            except PromptTooLongError as error:
                self.write(id_, Prompt(""), Answer(finish_reason=None, status="too_long", reason=str(error), attempts=0))
            else:
                yield Request(id_, prompt, run.sampling, seed_of(run.seed, id_), run.chat, run.options)

    def _prompt(self, problem: Problem) -> Prompt:
        run = self.run
        if run.stage == "refine":
            return teacher_prompt(
                problem.problem,
                "refine",
                rollout=problem.rollout,
                reference=problem.reference if run.with_reference else None,
                task=run.task,
                templates=run.templates,
                tokenizer=run.tokenizer,
                budget=run.max_prompt_tokens,
                chat=run.chat,
                options=run.options,
            )
        prompt = student_prompt(problem.problem, run.task, templates=run.templates)
        if run.max_prompt_tokens is not None:
            length = len(prompt.ids(run.tokenizer, chat=run.chat, options=run.options))
            if length > run.max_prompt_tokens:
                raise PromptTooLongError(f"the prompt has {length:,} tokens, max_prompt_tokens is {run.max_prompt_tokens:,}")
        return prompt

    def write(self, id_: str, prompt: Prompt, answer: Answer) -> None:
        """Verify the answer and write its record."""
        problem = self.asked.pop(id_)
        status, reason = status_of(answer)
        text = _clean(answer.text)
        verdict = None
        if self.verify is not None and status in USABLE:
            try:
                verdict = self.verify(problem.mapping, text)
            except Exception as error:
                reason = f"verify raised {type(error).__name__}: {error}"
            if verdict not in (True, False, None):
                raise TypeError(
                    f"verify must return True, False or None, got {verdict!r}; compare a score with what you accept"
                )
        record = {
            "id": id_,
            "stage": self.run.stage,
            "status": status,
            "reason": reason,
            "text": text,
            "finish_reason": answer.finish_reason,
            "verdict": None if verdict is None else bool(verdict),
            "attempts": answer.attempts + self.journal.earlier_attempts.get(id_, 0),
            "tokens": answer.tokens,
            "notice": prompt.notice,
            **problem.mapping,
        }
        with self.signals.held():
            self.journal.append(record)
        self.shown.add(status)


def _clean(text: str) -> str:
    """Return the text with U+FFFD for each half of a surrogate pair, which no tokenizer takes."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def seed_of(seed: int, id_: str) -> int:
    """Return the seed of one answer, below 2**31."""
    mark = hashlib.blake2b(json.dumps([seed, id_]).encode(), digest_size=4).digest()
    return int.from_bytes(mark, "big") >> 1
