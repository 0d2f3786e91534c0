"""An OpenAI-compatible server (vLLM, SGLang, ...) as a generator, on the openai client."""

import asyncio
import importlib.util
import os
import queue
import random
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from email.utils import parsedate_to_datetime
from itertools import count
from typing import Any

from topd.checks.values import positive_int, real
from topd.trd.generators import Answer, Answers, Request

RETRIED = (408, 429)  # and 5xx
# The request itself was not taken; every other 4xx (a key, a name, a path) is a failure that another try may mend.
REFUSED = (400, 413, 422, 451)
SHOWN = 500  # characters of a server's words


class FromServer:
    """Answers from an OpenAI-compatible server, many at a time.

    Status 408, 429 and 5xx, broken connections and time-outs are tried again after 1, 2, 4, ... seconds, each shortened at
    random by up to a half; where the server says Retry-After, no request is sent before. Any other 4xx is recorded at once in
    the server's words: "refused" where it is about the request (400, 413, 422, 451), else "failed". `reasoning_content` (also
    `reasoning`) stands in front of the response as <think>...</think>.

    Args:
        base_url: such as "http://localhost:8000/v1".
        model: the name by which the server knows the model.
        api_key_env: the environment variable that holds the key; None: the server wants none.
        concurrency: > 0, the most requests in flight.
        timeout: > 0, seconds for an answer, and the longest Retry-After that is waited for.
        retries: >= 0, tries after the first.
        backoff: > 0, seconds before the first retry; doubled before each further one, at most 60.

    Raises:
        ImportError: the openai client is not installed.
        TypeError, ValueError: a wrong option, or a variable that is not set.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key_env: str | None = None,
        concurrency: int = 64,
        timeout: float = 600,
        retries: int = 5,
        *,
        backoff: float = 1.0,
    ) -> None:
        if importlib.util.find_spec("openai") is None:
            raise ImportError('FromServer needs the openai client, which is not installed: pip install "topd[server]"')
        for name, value in (("base_url", base_url), ("model", model)):
            if not isinstance(value, str) or not value:
                raise ValueError(f"{name} must be a string that is not empty, got {value!r}")
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url must begin with http:// or https://, got {base_url!r}")
        if api_key_env is not None and not os.environ.get(api_key_env):
            raise ValueError(
                f"api_key_env names {api_key_env}, which is not set; export it, or leave api_key_env out where no key is wanted"
            )
        self.base_url, self.name = base_url, model
        self.api_key_env = api_key_env
        self.concurrency = positive_int("concurrency", concurrency)
        self.timeout = real("timeout", timeout, low=0, open_low=True)
        self.retries = retries if retries == 0 else positive_int("retries", retries, hint="or 0, for none")
        self.backoff = real("backoff", backoff, low=0, open_low=True)

    def answers(self, requests: Iterable[Request]) -> Answers:
        """Answer the requests, in the order in which the server does. Closing the iterator drops what is in flight."""
        waiting, done = iter(requests), queue.SimpleQueue[tuple[Request, Future[Answer]]]()
        flying = set[Future[Answer]]()
        with _event_loop() as loop:
            session = _Session(self)
            try:
                more = True
                while more or flying:
                    while more and len(flying) < self.concurrency:
                        request = next(waiting, None)
                        more = request is not None
                        if request is not None:
                            future = asyncio.run_coroutine_threadsafe(session.answer(request), loop)
                            flying.add(future)
                            future.add_done_callback(lambda future, request=request: done.put((request, future)))  # type: ignore[misc]
                    if flying:
                        request, future = done.get()
                        flying.remove(future)
                        yield request, future.result()
            finally:
                for future in flying:
                    future.cancel()
                asyncio.run_coroutine_threadsafe(session.close(), loop).result()


@contextmanager
def _event_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """Run an event loop in a thread of its own, so that requests go on while answers are verified and written."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="topd.trd requests", daemon=True)
    thread.start()
    try:
        yield loop
    finally:
        asyncio.run_coroutine_threadsafe(_end_tasks(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _end_tasks() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_asyncgens()


class _Session:
    """The client of one run over the requests, and until when the server wants to be left alone."""

    def __init__(self, server: FromServer) -> None:
        import openai

        key = "none" if server.api_key_env is None else os.environ[server.api_key_env]
        self.server, self.random, self.quiet_until = server, random.Random(), 0.0
        self.openai: Any = openai
        self.client: Any = openai.AsyncOpenAI(base_url=server.base_url, api_key=key, timeout=server.timeout, max_retries=0)

    async def close(self) -> None:
        await self.client.close()

    async def answer(self, request: Request) -> Answer:
        """Ask until there is an answer, or the retries are used up."""
        for attempt in count(1):
            while (pause := self.quiet_until - time.monotonic()) > 0:
                await asyncio.sleep(pause + self.random.uniform(0, self.server.backoff))
            try:
                return self._read(request, await self._send(request), attempt)
            except self.openai.APIStatusError as error:
                wait = retry_after(error.response.headers)
                reason = f"HTTP {error.status_code}: {_words(error)}"
                final = self._final(error, wait, reason, attempt)
                if final is not None:
                    return final
            except self.openai.APIConnectionError as error:
                wait, reason = None, f"{_words(error)} ({_words(error.__cause__)})" if error.__cause__ else _words(error)
            except (self.openai.APIError, ValueError) as error:  # ValueError: JSON that is none
                return Answer(finish_reason=None, status="failed", reason=_words(error), attempts=attempt)
            if attempt > self.server.retries:
                return Answer(finish_reason=None, status="failed", reason=f"{reason}; {attempt} tries", attempts=attempt)
            if wait:
                self.quiet_until = max(self.quiet_until, time.monotonic() + wait)
            else:
                longest = min(60.0, self.server.backoff * 2.0 ** (attempt - 1))
                await asyncio.sleep(longest * self.random.uniform(0.5, 1))
        raise AssertionError("unreachable")

    def _final(self, error: Any, wait: float | None, reason: str, attempt: int) -> Answer | None:
        """Return the answer where another try makes no sense; None where one does."""
        code = error.status_code
        if code in RETRIED or code >= 500:
            if wait is None or wait <= self.server.timeout:
                return None
            reason = f"{reason}; it asks to wait for {wait:,.0f} s, longer than timeout={self.server.timeout:g}"
            return Answer(finish_reason=None, status="failed", reason=reason, attempts=attempt)
        too_long = getattr(error, "code", None) == "context_length_exceeded"
        status = "too_long" if too_long else "refused" if code in REFUSED else "failed"
        return Answer(finish_reason=None, status=status, reason=reason, attempts=attempt)  # type: ignore[arg-type]

    async def _send(self, request: Request) -> Any:
        sampling = request.sampling
        extra: dict[str, Any] = {} if sampling.top_k is None else {"top_k": sampling.top_k}
        body = {
            "model": self.server.name,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens,
            "seed": request.seed,
        }
        if not request.chat:
            return await self.client.completions.create(**body, prompt=f"{request.prompt.text}\n", extra_body=extra)
        if request.options:
            extra["chat_template_kwargs"] = dict(request.options)
        return await self.client.chat.completions.create(**body, messages=request.prompt.messages, extra_body=extra)

    def _read(self, request: Request, completion: Any, attempt: int) -> Answer:
        """Return what the server's answer says; whatever it leaves out may be missing."""
        choices = getattr(completion, "choices", None)
        if not choices:
            reason = f"the server's answer is no completion: {str(completion)[:SHOWN]!r}"
            return Answer(finish_reason=None, status="failed", reason=reason, attempts=attempt)
        finish = choices[0].finish_reason or "stop"
        tokens = getattr(getattr(completion, "usage", None), "completion_tokens", None)
        if not request.chat:
            return Answer(choices[0].text or "", finish, attempts=attempt, tokens=tokens)
        message = choices[0].message
        content = message.content or ""
        reasoning = getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None) or ""
        text = content
        if reasoning:  # cut off by the length, a thought has no end
            text = f"<think>{reasoning}" + (f"</think>{content}" if content or finish == "stop" else "")
        if refusal := getattr(message, "refusal", None):
            return Answer(text or refusal, finish, "refused", str(refusal)[:SHOWN], attempt, tokens)
        if finish == "stop" and not content.strip():
            reason = "there is no answer after the reasoning" if reasoning else ""
            return Answer(text, finish, "empty", reason or "the response has no text", attempt, tokens)
        return Answer(text, finish, attempts=attempt, tokens=tokens)


def _words(error: BaseException) -> str:
    """Return the server's own words where it has any, in one line."""
    body = getattr(error, "body", None)
    text = body.get("message") if isinstance(body, Mapping) else None
    return " ".join((text if isinstance(text, str) else str(error) or type(error).__name__).split())[:SHOWN]


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that a server asks to wait, from retry-after-ms or Retry-After, seconds or a date; else None."""
    with suppress(KeyError, ValueError):
        return _not_negative(float(headers["retry-after-ms"]) / 1000)
    with suppress(KeyError, ValueError):
        return _not_negative(float(headers["retry-after"]))
    with suppress(KeyError, ValueError, TypeError):
        return max(0.0, parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time())
    return None


def _not_negative(seconds: float) -> float:
    """Check a number of seconds.

    Raises:
        ValueError: a negative number, or none at all.
    """
    if not seconds >= 0:  # NaN too
        raise ValueError(f"must be >= 0, got {seconds}")
    return seconds
