"""What a generator is asked and what it answers; a plain function as a generator."""

from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args, runtime_checkable

from topd.trd.prompts import Prompt

Status = Literal["ok", "length", "refused", "empty", "too_long", "failed"]
STATUSES: tuple[str, ...] = get_args(Status)


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn: temperature (0 is greedy), then the top_k most likely tokens (None: all), then the fewest of
    these that hold top_p; at most max_new_tokens."""

    temperature: float
    top_p: float
    top_k: int | None
    max_new_tokens: int


@dataclass(frozen=True)
class Request:
    """One answer that is wanted.

    Attributes:
        id: of the record that the answer becomes.
        prompt: what is read; `prompt.text`, `prompt.messages`.
        sampling: how to draw.
        seed: below 2**31, from the run's seed and the id: the same whenever this answer is asked for.
        chat, options: as in `Prompt.ids`.
    """

    id: str
    prompt: Prompt
    sampling: Sampling
    seed: int
    chat: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
        text: the response, "" where there is none.
        finish_reason: "stop" where the response ended by itself, "length" at max_new_tokens, or the server's word.
        status: None: from text and finish_reason. Set it where there is no response: "refused", "too_long", "failed".
        reason: why there is no response, in words.
        attempts: how often it was asked for.
        tokens: of the response, where known.
    """

    text: str = ""
    finish_reason: str | None = "stop"
    status: Status | None = None
    reason: str = ""
    attempts: int = 1
    tokens: int | None = None


Answers = Generator[tuple[Request, Answer], None, None]


@runtime_checkable
class AnswerSource(Protocol):
    """What `generate` asks. `name` goes into the file's settings."""

    name: str

    def answers(self, requests: Iterable[Request]) -> Answers:
        """Answer every request, in any order; take a request from the iterable only when there is room for it. Closed early,
        drop what is in flight."""


class FromCallable:
    """A function as a generator: it gets a `Request` and returns the response's text, or an `Answer`.

    One call at a time. An exception that it raises becomes a record with the status "failed".
    """

    def __init__(self, function: Callable[[Request], str | Answer]) -> None:
        self.function, self.name = function, "callable"

    def answers(self, requests: Iterable[Request]) -> Answers:
        for request in requests:
            try:
                answer = self.function(request)
            except Exception as error:
                answer = Answer(finish_reason=None, status="failed", reason=f"{type(error).__name__}: {error}")
            if isinstance(answer, str):
                answer = Answer(answer)
            if not isinstance(answer, Answer):
                raise TypeError(f"generator must return a string or a topd.trd.Answer, got {type(answer).__name__}")
            yield request, answer


def as_generator(generator: object) -> AnswerSource:
    """Return the generator, a function wrapped."""
    if isinstance(generator, AnswerSource):
        return generator
    if callable(generator):
        return FromCallable(generator)
    raise TypeError(
        f"generator must be a function, a topd.trd.FromModel or a topd.trd.FromServer, got {type(generator).__name__}"
    )


def status_of(answer: Answer) -> tuple[Status, str]:
    """Return the status of an answer, and the reason where there is no response."""
    if answer.status is not None:
        return answer.status, answer.reason
    if answer.finish_reason == "content_filter":
        return "refused", answer.reason or "the server's content filter stopped the response"
    if answer.finish_reason == "length":
        return "length", answer.reason
    if answer.finish_reason != "stop":
        return "failed", answer.reason or f"the response ended with finish_reason {answer.finish_reason!r}"
    return ("ok", answer.reason) if answer.text.strip() else ("empty", answer.reason or "the response has no text")
