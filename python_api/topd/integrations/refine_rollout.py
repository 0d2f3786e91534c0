"""Online TRD: the student answers, the teacher rewrites the answer, and both are compared on what the teacher wrote."""

import warnings
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from topd.checks.values import flag, positive_int
from topd.integrations.rollouts import check_sampling, sample_rollouts
from topd.models.head_from_model import unwrapped_model
from topd.models.properties import vocabulary_of
from topd.models.sampling import all_end_tokens, left_padded, most_positions, plain_text
from topd.objectives.gating import all_processes
from topd.objectives.opsd import OPSD
from topd.objectives.pairs import pair
from topd.trd.pipeline import MAX_REFINE_TOKENS, MAX_REFINE_TOKENS_WITH_REFERENCE
from topd.trd.prompts import TEACHER_OPTIONS, Prompt, PromptTooLongError, Task, teacher_prompt
from topd.trd.templates import Templates, templates_of

# What befalls a row beside "ok" and "length": where the response stays empty, and where a prompt was cut.
NOTICES = {
    "empty_rollout": "their rollouts have no text: their responses are empty",
    "too_long": "their problem and instructions alone exceed the prompt's budget: their responses are empty",
    "empty": "the teacher wrote no text: their responses are empty",
    "cut": "the end of their rollouts, or of their references, was cut off for the prompt's budget",
}


class _Asked(NamedTuple):
    """What the teacher is asked of a row: its prompt, and whether texts in it were cut; or the status that says why nothing."""

    status: str
    prompt: list[int] | None = None
    cut: bool = False


class RefineRollout:
    """Sample the student's rollouts y_o, have the teacher refine them to y_r, and return pairs whose response is y_r.

    It is a `rollout` of `DistillationTrainer`, or of a loop of your own: `refine(student, batch)` takes prompts and returns the
    batch of `topd.pair`. Student and teacher read x and refine_prompt(x, y_o), both followed by the tokens that the teacher
    drew, its end token where it stopped by itself.

    Args:
        teacher: a causal language model of transformers, on its own device; in most cases the objective's. Or a `topd.OPSD`:
            then the student refines with the weights with which it teaches, for instance with its LoRA off; given as a model
            it would refine with its present ones.
        tokenizer: of student and teacher both.
        max_new_tokens: > 0, the longest rollout.
        refine_max_new_tokens: > 0, the longest refinement; None: max_new_tokens.
        max_prompt_tokens: > 0, the longest refine prompt: the rollout is cut at its end for it, then the reference. None:
            18,432, with a reference 22,528, or what the teacher's positions leave beside the refinement, where that is less.
        task: "math" or "code": which words the prompt has.
        temperature, top_p, top_k: of both; as in `sample_rollouts`.
        templates: words of your own instead of ours.
        chat: False: the plain prompt and a newline instead of a chat.
        template_options: further words for the chat template; None: {"enable_thinking": True}.

    Attributes:
        counts: how many rows there were of each kind: "ok"; "length", a refinement that reached refine_max_new_tokens; and
            "empty_rollout", "too_long" and "empty", whose responses are empty; beside these "cut", rows whose prompt was cut.
            The first of each kind that loses something is warned of.

    In several processes each calls this equally often; one that has nothing to refine calls the teacher all the same.

    Raises:
        TypeError, ValueError: a wrong option; a tokenizer without a chat template; more tokens than the teacher has positions.

    Source: arXiv 2606.08432, eq. 6, and Table 9 for the sampling.
    """

    def __init__(
        self,
        teacher: Any,
        tokenizer: Any,
        *,
        max_new_tokens: int,
        refine_max_new_tokens: int | None = None,
        max_prompt_tokens: int | None = None,
        task: Task = "math",
        temperature: float = 0.6,
        top_p: float = 0.95,
        top_k: int | None = 20,
        templates: Templates | None = None,
        chat: bool = True,
        template_options: Mapping[str, Any] | None = None,
    ) -> None:
        self._teaching = teacher.teaching if isinstance(teacher, OPSD) else partial(nullcontext, teacher)
        self.teacher = teacher.teacher if isinstance(teacher, OPSD) else teacher
        if not hasattr(self.teacher, "generate"):
            came = type(self.teacher).__name__
            raise TypeError(f"teacher must have generate, got {came}; pass the causal language model, or a topd.OPSD")
        self.tokenizer, self.task = tokenizer, task
        self.max_new_tokens = positive_int("max_new_tokens", max_new_tokens)
        self.refine_max_new_tokens = self.max_new_tokens
        if refine_max_new_tokens is not None:
            self.refine_max_new_tokens = positive_int("refine_max_new_tokens", refine_max_new_tokens)
        self.max_prompt_tokens, self.room = max_prompt_tokens, self._checked_room(max_prompt_tokens)
        check_sampling(temperature, top_p, top_k)
        self.sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
        self.templates = templates_of(task, templates)
        self.chat, self.options = flag("chat", chat), dict(TEACHER_OPTIONS if template_options is None else template_options)
        Prompt("").rendered(tokenizer, chat=chat, options=self.options)  # refused here, not at the first step
        self.counts: Counter[str] = Counter()

    def __call__(self, student: Any, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the pairs of a batch of prompts.

        Args:
            student: the model that is trained.
            batch: input_ids and attention_mask [B, P], the student's prompts, padded on the left; problem, a list of the B
                problems' texts, which the refine prompt repeats; optional reference, a list of B right solutions or None,
                which the teacher reads too.

        Raises:
            TypeError, ValueError: as `sample_rollouts`; texts that are missing.
        """
        ids, mask = (_tensor(batch, key) for key in ("input_ids", "attention_mask"))
        problems, references = _texts(batch, "problem", len(ids)), [None] * len(ids)
        if batch.get("reference") is not None:
            references = _texts(batch, "reference", len(ids))
        own_ends = self._ends(student)
        options = {"max_new_tokens": self.max_new_tokens, "eos_token_id": own_ends, **self.sampling}
        rollouts = responses_of(sample_rollouts(student, ids, mask, **options))
        texts = zip(problems, rollouts, references, strict=True)
        asked = [self._asked(problem, self._text(rollout, own_ends), reference) for problem, rollout, reference in texts]
        answers = iter(self._refined(student, [each.prompt for each in asked if each.prompt]))
        responses = [next(answers) if each.prompt else [] for each in asked]
        statuses = [each.status or self._status(response) for each, response in zip(asked, responses, strict=True)]
        self._count(statuses, sum(each.cut for each in asked))
        responses = [[] if status == "empty" else each for status, each in zip(statuses, responses, strict=True)]
        own = [row[kept].tolist() for row, kept in zip(ids, mask != 0, strict=True)]
        read = [each.prompt or prompt for each, prompt in zip(asked, own, strict=True)]
        return {key: value.to(ids.device) for key, value in pair(own, read, responses, self._padding).items()}

    def _asked(self, problem: str, rollout: str, reference: str | None) -> _Asked:
        """Return the refine prompt, or why there is none."""
        if not rollout.strip():
            return _Asked("empty_rollout")
        paper = MAX_REFINE_TOKENS if reference is None else MAX_REFINE_TOKENS_WITH_REFERENCE
        chat: dict[str, Any] = {"chat": self.chat, "options": self.options}
        try:
            prompt = teacher_prompt(
                problem,
                "refine",
                rollout=rollout,
                reference=reference,
                task=self.task,
                templates=self.templates,
                tokenizer=self.tokenizer,
                budget=self.max_prompt_tokens or min(paper, self.room),
                **chat,
            )
        except PromptTooLongError:
            return _Asked("too_long")
        return _Asked("", prompt.ids(self.tokenizer, **chat), bool(prompt.notice))

    def _refined(self, student: Any, prompts: list[list[int]]) -> list[list[int]]:
        """Return the teacher's answers to the prompts.

        Several processes may hold parts of the teacher (FSDP, ZeRO-3), whose layers they gather together. So a process that has
        no prompt lets the teacher write a token all the same, and goes on with the others from there (`in_step`).
        """
        if not prompts and all_processes() is None:
            return []
        ids, mask = left_padded(prompts or [[self._padding]], self._padding, unwrapped_model(self.teacher).device)
        longest = self.refine_max_new_tokens if prompts else 1
        options: dict[str, Any] = {"max_new_tokens": longest, "eos_token_id": self._ends(self.teacher)}
        if vocabulary_of(student) < vocabulary_of(self.teacher):
            options["vocabulary"] = vocabulary_of(student)
        with self._teaching() as teacher:
            answers = responses_of(sample_rollouts(teacher, ids, mask, **options, **self.sampling))
        return answers if prompts else []

    def _status(self, response: list[int]) -> str:
        """Return what a refinement is."""
        ends = self._ends(self.teacher)
        if not self._text(response, ends).strip():
            return "empty"
        return "ok" if response[-1] in ends else "length"

    def _count(self, statuses: list[str], cut: int) -> None:
        """Add to the counts, and warn of the first of each kind that loses something."""
        new = Counter(statuses) + Counter(cut=cut)
        for kind, notice in NOTICES.items():
            if new[kind] and not self.counts[kind]:
                warnings.warn(
                    f"{new[kind]} of {len(statuses)} rows of RefineRollout: {notice}; this is said once, counts[{kind!r}] goes "
                    "on counting",
                    stacklevel=3,
                )
        self.counts += new

    def _ends(self, model: Any) -> list[int]:
        """Return the tokens that end a response."""
        return all_end_tokens(unwrapped_model(model), self.tokenizer)

    def _text(self, tokens: list[int], ends: list[int]) -> str:
        """Return the text of a response, without its end token."""
        return plain_text(self.tokenizer, tokens[:-1] if tokens and tokens[-1] in ends else tokens)

    @property
    def _padding(self) -> int:
        padding = getattr(self.tokenizer, "pad_token_id", None)
        return padding if isinstance(padding, int) else 0

    def _checked_room(self, max_prompt_tokens: int | None) -> int:
        """Return how many tokens of a prompt the teacher's positions leave beside the refinement."""
        if max_prompt_tokens is not None:
            positive_int("max_prompt_tokens", max_prompt_tokens)
        positions = most_positions(unwrapped_model(self.teacher))
        if positions is None:
            return MAX_REFINE_TOKENS_WITH_REFERENCE
        room = positions - self.refine_max_new_tokens
        if room < (max_prompt_tokens or 1):
            raise ValueError(
                f"max_prompt_tokens and refine_max_new_tokens must fit into the teacher's {positions:,} positions, got "
                f"{max_prompt_tokens} and {self.refine_max_new_tokens:,}; lower one of them"
            )
        return room


def responses_of(rollouts: Mapping[str, Tensor]) -> list[list[int]]:
    """Return the response tokens of each row."""
    return [ids[kept].tolist() for ids, kept in zip(rollouts["input_ids"], rollouts["response_mask"], strict=True)]


def _tensor(batch: Mapping[str, Any], key: str) -> Tensor:
    if not isinstance(batch.get(key), Tensor):
        raise ValueError(f"batch must hold {key}, a tensor [B, P], got {sorted(batch)}")
    return batch[key]  # type: ignore[no-any-return]


def _texts(batch: Mapping[str, Any], key: str, rows: int) -> list[Any]:
    """Return a batch's texts, one for each row; of references some may be None."""
    texts = batch.get(key)
    if texts is None:
        raise ValueError(
            f"batch must hold {key}, a list of the {rows} prompts' texts, which the refine prompt repeats, got "
            f"{sorted(batch)}; let data_collator keep it beside input_ids (Trainer's default one drops texts)"
        )
    if not isinstance(texts, list | tuple) or len(texts) != rows:
        came = len(texts) if isinstance(texts, list | tuple) else type(texts).__name__
        raise ValueError(f"{key} must be a list with a text for each of the {rows} prompts, got {came}")
    return list(texts)
