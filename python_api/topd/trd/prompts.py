"""What student and teacher read in front of a response, as text, as messages of a chat and as token ids."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

from topd.checks.values import choice, positive_int
from topd.trd.templates import Templates, filled, templates_of

Task = Literal["math", "code"]
Context = Literal["plain", "reference", "refine"]
CONTEXTS: tuple[str, ...] = get_args(Context)
# Further words for a chat template. One that knows no thinking ignores them.
STUDENT_OPTIONS: Mapping[str, Any] = {"enable_thinking": False}
TEACHER_OPTIONS: Mapping[str, Any] = {"enable_thinking": True}
SLACK = 4  # tokens of a budget that a cut text may leave unused


class PromptTooLongError(ValueError):
    """The problem and the instructions alone are longer than the budget."""


@dataclass(frozen=True)
class Prompt:
    """What one side reads before the response.

    Attributes:
        text: the content of the user's turn.
        rollout_tokens_cut, reference_tokens_cut: how many tokens of these texts were cut off at their end for the budget; the
            text has a notice where that happened.
    """

    text: str
    rollout_tokens_cut: int = 0
    reference_tokens_cut: int = 0

    @property
    def notice(self) -> str:
        """What was cut, in words; empty where nothing was."""
        cuts = {"rollout": self.rollout_tokens_cut, "reference": self.reference_tokens_cut}
        return ", ".join(f"{count:,} tokens of the {name} were cut off" for name, count in cuts.items() if count)

    @property
    def messages(self) -> list[dict[str, str]]:
        """The chat, as servers and chat templates take it."""
        return [{"role": "user", "content": self.text}]

    def rendered(self, tokenizer: Any, *, chat: bool = True, options: Mapping[str, Any] | None = None) -> str:
        """Return the text that is tokenized: through the tokenizer's chat template up to where the answer begins, or with
        chat=False the plain text and a newline.

        Raises:
            ValueError: the tokenizer has no chat template.
        """
        if not chat:
            return f"{self.text}\n"
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError(
                f"{type(tokenizer).__name__} has no chat template; pass chat=False for the plain prompt and a newline, or set "
                "tokenizer.chat_template"
            )
        return str(tokenizer.apply_chat_template(self.messages, add_generation_prompt=True, tokenize=False, **(options or {})))

    def ids(self, tokenizer: Any, *, chat: bool = True, options: Mapping[str, Any] | None = None) -> list[int]:
        """Return the token ids of `rendered`. A chat template writes its own special tokens; the plain text has those that the
        tokenizer puts in front, and no end token."""
        ids = tokenizer(self.rendered(tokenizer, chat=chat, options=options), add_special_tokens=not chat)["input_ids"]
        plain_end = not chat and ids and ids[-1] == getattr(tokenizer, "eos_token_id", None)
        return list(ids[:-1] if plain_end else ids)


def student_prompt(problem: str, task: Task = "math", *, templates: Templates | None = None) -> Prompt:
    """Return what the student reads: the problem and how to answer.

    Args:
        problem: the problem's text.
        task: "math" asks for the answer in \\boxed{}, "code" for one python block.
        templates: words of your own instead.
    """
    return Prompt(filled(templates_of(task, templates).student, {"problem": _text("problem", problem)}))


def teacher_prompt(
    problem: str,
    context: Context = "plain",
    *,
    rollout: str | None = None,
    reference: str | None = None,
    task: Task = "math",
    templates: Templates | None = None,
    tokenizer: Any = None,
    budget: int | None = None,
    chat: bool = True,
    options: Mapping[str, Any] | None = None,
) -> Prompt:
    """Return what the teacher reads before the response.

    Args:
        problem: the problem's text.
        context: "plain", what the student reads; "reference", the problem and a reference solution; "refine", the problem and
            the student's rollout, with the reference solution too where one is given.
        rollout: the student's solution, for "refine" alone.
        reference: a right solution, for "reference" and, if you like, "refine".
        task: "math" or "code".
        templates: words of your own instead.
        tokenizer: of the teacher; needed for a budget.
        budget: > 0, the most tokens of the prompt; the room for the answer comes beside it. Over budget the rollout is cut
            at its end, then the reference; the problem and the instructions never. None: any length.
        chat, options: as in `Prompt.ids`: how the prompt will be tokenized. options None: `TEACHER_OPTIONS`.

    Raises:
        TypeError, ValueError: a text that is missing, or that this context does not read; a budget without a tokenizer.
        PromptTooLongError (a ValueError): the problem and the instructions alone exceed the budget.

    Source: arXiv 2606.08432 for the contents and the order of cutting; the words are ours.
    """
    choice("context", context, CONTEXTS)
    words = templates_of(task, templates)
    texts = {"problem": _text("problem", problem)}
    if context == "refine":
        texts["rollout"] = _text("rollout", rollout)
    elif rollout is not None:
        raise ValueError(f"rollout is read with context='refine' alone, got context={context!r}; leave it out")
    if context == "reference" or (context == "refine" and reference is not None):
        texts["reference"] = _text("reference", reference)
    elif reference is not None:
        raise ValueError(f"reference is not read with context={context!r}; leave it out, or take context='reference'")
    template = {"plain": words.student, "reference": words.reference}.get(
        context, words.refine if reference is None else words.refine_with_reference
    )
    if budget is None:
        return Prompt(filled(template, texts))
    positive_int("budget", budget)
    if tokenizer is None:
        raise ValueError("tokenizer is missing: a budget counts its tokens; pass the teacher's")
    options = TEACHER_OPTIONS if options is None else options
    return _fitting(template, texts, words.cut_notice, tokenizer, budget, chat, options)


def _text(name: str, value: object) -> str:
    if value is None:
        raise ValueError(f"{name} is missing: this context reads it; pass {name}=")
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {type(value).__name__}")
    return value


def _fitting(
    template: str, texts: dict[str, str], notice: str, tokenizer: Any, budget: int, chat: bool, options: Mapping[str, Any]
) -> Prompt:
    """Return the prompt with as much of the rollout as fits; where none does, with as much of the reference as fits."""

    kept = dict(texts)

    def size_with(name: str, text: str) -> int:
        return len(Prompt(filled(template, {**kept, name: text})).ids(tokenizer, chat=chat, options=options))

    least = size_with("problem", texts["problem"])
    cuts: dict[str, int] = {}
    for name in ("rollout", "reference"):
        if least > budget and name in texts:
            start = _longest_start(texts[name], notice, partial(size_with, name), budget)
            kept[name] = _noticed(start, notice)
            cuts[f"{name}_tokens_cut"] = _count(tokenizer, texts[name]) - _count(tokenizer, start)
            least = size_with(name, kept[name])
    if least <= budget:
        return Prompt(filled(template, kept), **cuts)
    alone = _count(tokenizer, texts["problem"])
    raise PromptTooLongError(
        f"budget is {budget:,} tokens, but the prompt takes {least:,} without the texts that may be cut: the problem "
        f"{alone:,}, the instructions {least - alone:,}; raise the budget or leave this problem out"
    )


def _longest_start(text: str, notice: str, size: Callable[[str], int], budget: int) -> str:
    """Return the longest start of the text with which, and the notice behind it, the prompt keeps the budget; else "". Guesses
    between the two sizes known, since a token takes about as many characters everywhere."""
    low, low_size = 0, size(notice)
    high, high_size = len(text), size(text)
    halve = False
    while high - low > 1 and low_size <= budget - SLACK:
        share = 0.5 if halve or high_size <= low_size else (budget - low_size) / (high_size - low_size)
        middle = min(max(low + int(share * (high - low)), low + 1), high - 1)
        middle_size = size(_noticed(text[:middle].rstrip(), notice))
        halve = not halve
        if middle_size <= budget:
            low, low_size = middle, middle_size
        else:
            high, high_size = middle, middle_size
    return text[:low].rstrip()


def _noticed(start: str, notice: str) -> str:
    return f"{start}\n{notice}" if start else notice


def _count(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])
