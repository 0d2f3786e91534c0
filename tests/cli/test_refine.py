"""`topd refine`: both stages against a server on this machine, and errors of one line."""

import json

import pytest
from local_server import serving

from topd.cli.main import main
from topd.trd import read_run

pytest.importorskip("openai")


@pytest.fixture
def server():
    with serving() as server:
        yield server


@pytest.fixture
def problems(tmp_path):
    path = tmp_path / "problems.jsonl"
    rows = [{"id": number, "problem": f"problem {number}", "reference": "yes"} for number in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def refine(*words):
    return main(["refine", *map(str, words)])


def test_both_stages_and_their_summary(tmp_path, server, problems, capsys):
    (tmp_path / "check.py").write_text("def is_right(problem, text):\n    return problem['problem'] in text\n")
    rollouts, refined = tmp_path / "rollouts.jsonl", tmp_path / "refined.jsonl"
    to = ("--url", server.url, "--verify", f"{tmp_path / 'check.py'}:is_right")
    assert refine(problems, "--out", rollouts, "--model", "student", *to) == 0
    assert "4 records of stage rollout: ok 4; 4 requests" in capsys.readouterr().out
    options = ("--stage", "refine", "--with-reference", "--thinking", "off", "--top-k", "-1", "--temperature", "0")
    assert refine(rollouts, "--out", refined, "--model", "teacher", *options, *to) == 0
    settings, records = read_run(refined)
    assert (settings["model"], settings["top_k"], settings["temperature"]) == ("teacher", None, 0.0)
    assert settings["template_options"] == {"enable_thinking": False}
    assert all(record["verdict"] and record["rollout_verdict"] for record in records)
    capsys.readouterr()
    assert refine(refined, "--summary") == 0
    out = capsys.readouterr().out
    assert "4 records of stage refine" in out
    assert "rollout right" in out
    asked = server.asked.total()
    assert refine(problems, "--out", rollouts, "--model", "student", *to) == 0
    assert server.asked.total() == asked


def test_failures_are_counted_and_asked_again(tmp_path, server, capsys):
    path = tmp_path / "problems.jsonl"
    path.write_text('{"problem": "problem 1 STATUS 500 once"}\n')
    words = (path, "--out", tmp_path / "run.jsonl", "--url", server.url, "--model", "m", "--retries", "0")
    assert refine(*words) == 1
    assert "1 failed; --retry-failed asks for them again" in capsys.readouterr().err
    assert refine(*words, "--retry-failed") == 0


def one_line(capsys, *words, status=1):
    if status == 2:
        with pytest.raises(SystemExit) as stopped:
            refine(*words)
        assert stopped.value.code == 2
    else:
        assert refine(*words) == status
    streams = capsys.readouterr()
    assert streams.err.count("\n") == 1, streams.err
    assert "own?" not in streams.err
    return streams.err


def test_errors_are_one_line_each(tmp_path, server, problems, capsys):
    out = tmp_path / "run.jsonl"
    words = (problems, "--out", out, "--url", server.url, "--model", "m")
    assert "--out, --url, --model must be given" in one_line(capsys, problems)
    assert "base_url must begin with http" in one_line(capsys, *words[:3], "--url", "localhost", "--model", "m")
    assert "top_p must be" in one_line(capsys, *words, "--top-p", "2")
    assert "has no 'rollout'" in one_line(capsys, *words, "--stage", "refine")
    assert "another kind of file" in one_line(capsys, problems, "--summary")
    assert "api_key_env names NO_KEY, which is not set" in one_line(capsys, *words, "--api-key-env", "NO_KEY")
    assert "--verify must be PLACE:NAME" in one_line(capsys, *words, "--verify", "check.py")
    assert "No module named 'nowhere'" in one_line(capsys, *words, "--verify", "nowhere:f")
    assert "--tokenizer" in one_line(capsys, *words, "--tokenizer", tmp_path)
    assert "must name a file that is there" in one_line(capsys, tmp_path / "none", "--summary", status=2)
    assert "must be a number" in one_line(capsys, *words, "--temperature", "warm", status=2)
    assert not out.exists()
    assert refine(*words) == 0
    capsys.readouterr()
    line = one_line(capsys, *words, "--temperature", "0.8")
    assert line == "topd refine: temperature is 0.6 in run.jsonl, got 0.8; take another file\n"


def test_without_the_client_one_line_says_what_to_install(problems, capsys, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openai" else find(name))
    line = one_line(capsys, problems, "--out", "x", "--url", "http://localhost", "--model", "m")
    assert line == 'topd refine: openai is not installed, and a server needs it: pip install "topd[server]"\n'


def test_ctrl_c_says_how_to_go_on(tmp_path, problems, capsys, monkeypatch):
    from topd.cli import refine as command

    def interrupted(*_arguments, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "generate", interrupted)
    words = (problems, "--out", tmp_path / "a", "--url", "http://localhost", "--model", "m")
    assert "stopped; go on with the same command" in one_line(capsys, *words, status=130)
