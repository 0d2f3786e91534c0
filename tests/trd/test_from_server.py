"""A real HTTP server on this machine that refuses, breaks, storms and thinks."""

import itertools
import random
import re
import threading
import time

import pytest
from local_server import serving

from topd.trd import FromServer, generate, read_run
from topd.trd.from_server import retry_after

pytest.importorskip("openai")


@pytest.fixture
def server():
    with serving() as server:
        yield server


def run(server, tmp_path, *words, concurrency=64, options=None, **run_options):
    """Records by number, of problems with these words."""
    problems = [{"problem": f"problem {number} {word}"} for number, word in enumerate(words)]
    generator = FromServer(server.url, "the-model", concurrency=concurrency, **{"backoff": 0.02, **(options or {})})
    generate(problems, generator, tmp_path / "run.jsonl", progress=False, **run_options)
    return [record for _, record in sorted((int(record["id"]), record) for record in read_run(tmp_path / "run.jsonl")[1])]


def test_what_is_sent_is_what_was_set(server, tmp_path):
    (record,) = run(server, tmp_path, "", top_k=7, max_new_tokens=99)
    ((path, headers, body),) = server.bodies
    assert path == "/v1/chat/completions"
    expected = {"model": "the-model", "temperature": 0.6, "top_p": 0.95, "top_k": 7, "max_tokens": 99}
    assert expected.items() <= body.items()
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert body["messages"][0]["content"].startswith("problem 0")
    assert 0 <= body["seed"] < 2**31
    assert headers["Authorization"] == "Bearer none"
    assert (record["text"], record["status"], record["tokens"]) == ("answers problem 0 — ∑ 答え 🙂\u2028\x00", "ok", 7)


def test_without_a_chat_the_plain_prompt_is_completed(server, tmp_path):
    (record,) = run(server, tmp_path, "", chat=False, top_k=None)
    ((path, _, body),) = server.bodies
    assert path == "/v1/completions"
    assert body["prompt"].endswith("\\boxed{}.\n")
    assert "chat_template_kwargs" not in body
    assert "top_k" not in body
    assert record["text"] == "completes problem 0"


def test_the_key_comes_from_the_variable_alone(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "not-for-this-server")
    monkeypatch.setenv("OTHER_KEY", "secret")
    run(server, tmp_path, "", options={"api_key_env": "OTHER_KEY"})
    assert server.bodies[0][1]["Authorization"] == "Bearer secret"
    assert "secret" not in (tmp_path / "run.jsonl").read_text()
    with pytest.raises(ValueError, match="api_key_env names NO_SUCH_KEY, which is not set"):
        FromServer(server.url, "m", "NO_SUCH_KEY")


def test_every_answer_has_its_status(server, tmp_path):
    words = ("", "LENGTH", "EMPTY", "REFUSE", "FILTER", "THINK", "MUSE LENGTH", "MUSE", "HTML", "CONTEXT")
    records = run(server, tmp_path, *words)
    statuses = ["ok", "length", "empty", "refused", "refused", "ok", "length", "empty", "failed", "too_long"]
    assert [record["status"] for record in records] == statuses
    assert records[3]["reason"] == "I will not"
    assert records[5]["text"].startswith("<think>\nso\n</think>answers problem 5")
    assert records[6]["text"] == "<think>still"
    assert records[7]["text"] == "<think>still</think>"
    assert "<html>a page</html>" in records[8]["reason"]
    assert {record["attempts"] for record in records} == {1}
    assert set(server.asked.values()) == {1}


def test_other_4xx_are_recorded_at_once_in_the_servers_words(server, tmp_path):
    codes = {400: "refused", 401: "failed", 403: "failed", 404: "failed", 409: "failed", 413: "refused", 422: "refused"}
    records = run(server, tmp_path, *(f"STATUS {code}" for code in codes))
    assert [record["status"] for record in records] == list(codes.values())
    for number, (code, record) in enumerate(zip(codes, records, strict=True)):
        assert record["reason"] == f"HTTP {code}: the server's words on problem {number}"
    assert set(server.asked.values()) == {1}


def test_what_passes_is_tried_again(server, tmp_path):
    words = ("BROKEN", "TORN", "HANGING", *(f"STATUS {code} once" for code in (408, 429, 500, 502, 503, 529)))
    records = run(server, tmp_path, *words, options={"timeout": 1.0})
    assert {(record["status"], record["attempts"]) for record in records} == {("ok", 2)}
    assert set(server.asked.values()) == {2}


def test_after_the_retries_it_has_failed(server, tmp_path):
    records = run(server, tmp_path, "STATUS 503", "STATUS 429", options={"retries": 2})
    assert [(record["status"], record["attempts"]) for record in records] == [("failed", 3)] * 2
    assert records[0]["reason"] == "HTTP 503: the server's words on problem 0; 3 tries"
    assert server.asked == {"problem 0": 3, "problem 1": 3}
    nobody = FromServer("http://127.0.0.1:9/v1", "m", retries=1, backoff=0.01)
    generate([{"problem": "x"}], nobody, tmp_path / "nobody", progress=False)
    (record,) = read_run(tmp_path / "nobody")[1]
    assert (record["status"], record["attempts"]) == ("failed", 2)
    assert "Connection error" in record["reason"]


def test_storms_of_429_are_waited_out_and_counted(server, tmp_path):
    began = time.monotonic()
    records = run(server, tmp_path, *["STORM 2 after 0.15"] * 30)
    assert time.monotonic() - began > 0.3
    assert {(record["status"], record["attempts"]) for record in records} == {("ok", 3)}
    assert server.asked.total() == 90


def test_while_the_server_wants_to_be_left_alone_nobody_asks(server, tmp_path):
    """The Retry-After of one problem holds for the others too."""
    stamps = []
    respond = server.RequestHandlerClass.respond

    class Stamped(server.RequestHandlerClass):
        def respond(self, *arguments):
            stamps.append(time.monotonic())
            respond(self, *arguments)

    server.RequestHandlerClass, server.delay = Stamped, 0.02
    run(server, tmp_path, "STORM 1 after 0.6", *[""] * 20, concurrency=2, options={"backoff": 0.01})
    assert max(later - earlier for earlier, later in itertools.pairwise(stamps)) > 0.5
    assert len(stamps) == 22


def test_a_wait_beyond_the_timeout_is_a_failure(server, tmp_path):
    (record,) = run(server, tmp_path, "STORM 1 after 4000", options={"timeout": 30})
    assert record["status"] == "failed"
    assert "it asks to wait for 4,000 s, longer than timeout=30" in record["reason"]


@pytest.mark.parametrize("concurrency", [1, 5])
def test_concurrency_is_a_bound_and_is_used(server, tmp_path, concurrency):
    respond = server.RequestHandlerClass.respond

    class Patient(server.RequestHandlerClass):
        def respond(self, *arguments):
            """Keeps everybody until as many as may be are there."""
            deadline = time.monotonic() + 10
            while server.most < concurrency and time.monotonic() < deadline:
                time.sleep(0.002)
            respond(self, *arguments)

    server.RequestHandlerClass = Patient
    run(server, tmp_path, *[""] * 30, concurrency=concurrency)
    assert server.most == concurrency


def test_only_what_can_fly_is_taken_from_the_problems(server):
    taken = []

    def requests():
        from topd.trd import Request, Sampling, student_prompt

        for number in range(100):
            taken.append(number)
            yield Request(str(number), student_prompt(f"problem {number}"), Sampling(0.6, 0.95, 20, 9), 0)

    answers = FromServer(server.url, "m", concurrency=3).answers(requests())
    next(answers)
    answers.close()
    assert len(taken) == 3
    assert not [thread for thread in threading.enumerate() if "topd.trd" in thread.name]


def test_the_clients_own_retries_are_off(server, tmp_path):
    run(server, tmp_path, "STATUS 500", options={"retries": 0})
    assert server.asked == {"problem 0": 1}


def test_two_hundred_answers_in_any_order(server, tmp_path):
    words = [random.Random(number).choice(["", "STATUS 500 once", "BROKEN", "STORM 1 after 0"]) for number in range(200)]
    records = run(server, tmp_path, *words, concurrency=16)
    assert [record["id"] for record in records] == [str(number) for number in range(200)]
    assert all(record["text"].startswith(f"answers problem {record['id']} ") for record in records)
    assert sum(record["attempts"] for record in records) == server.asked.total()


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [({"retry-after": "3"}, 3), ({"retry-after": "0.5"}, 0.5), ({"retry-after-ms": "250", "retry-after": "9"}, 0.25)]
    + [({"retry-after": word}, None) for word in ("soon", "-1", "nan", "")]
    + [({}, None), ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0), ({"retry-after-ms": "x", "retry-after": "2"}, 2)],
)
def test_retry_after_in_all_its_forms(headers, seconds):
    assert retry_after(headers) == seconds


def test_a_date_of_retry_after_lies_ahead():
    from email.utils import formatdate

    assert 8 < retry_after({"retry-after": formatdate(time.time() + 10, usegmt=True)}) <= 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": "localhost:8000"}, "base_url must begin with http:// or https://, got 'localhost:8000'"),
        ({"model": ""}, "model must be a string that is not empty"),
        ({"concurrency": 0}, "concurrency must be > 0"),
        ({"timeout": 0}, "timeout must be finite and > 0"),
        ({"retries": -1}, "retries must be > 0, got -1; or 0, for none"),
        ({"backoff": 0}, "backoff must be finite and > 0"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        FromServer(**{"base_url": "http://localhost", "model": "m", **options})


def test_without_the_client_the_message_says_what_to_install(monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openai" else find(name))
    with pytest.raises(ImportError, match=r'needs the openai client, which is not installed: pip install "topd\[server\]"'):
        FromServer("http://localhost", "m")
