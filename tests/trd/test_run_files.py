"""What `generate` reads and writes: problems from a file, records, text of any kind, what a terminal shows."""

import json

import pytest
from trd_cases import PROBLEMS, records, run, student

from topd.trd import generate, read_run


def test_a_verifier_that_breaks_leaves_the_verdict_open(tmp_path):
    generate(PROBLEMS, student, tmp_path / "a", verify=lambda *_: 1 / 0, progress=False)
    assert {record["verdict"] for record in read_run(tmp_path / "a")[1]} == {None}
    assert records(tmp_path / "a")["p0"]["reason"] == "verify raised ZeroDivisionError: division by zero"


def test_problems_from_a_file(tmp_path):
    (tmp_path / "problems.jsonl").write_text('{"problem": "1 + 1?"}\n\n{"problem": "2 + 1?", "id": "b"}\n')
    generate(tmp_path / "problems.jsonl", student, str(tmp_path / "a"), progress=False)
    assert list(records(tmp_path / "a")) == ["1", "b"]
    (tmp_path / "problems.jsonl").write_text('{"problem"\n')
    with pytest.raises(ValueError, match=r"line 1 of .*problems.jsonl is no JSON"):
        generate(tmp_path / "problems.jsonl", student, tmp_path / "b")


def test_unicode_comes_back_as_it_was(tmp_path):
    text = "∑ 答え 🙂\u2028\x00\r\n é"
    generate([{"id": text, "problem": text}], lambda _request: text + "\ud83d", tmp_path / "a", progress=False)
    record = records(tmp_path / "a")[text]
    assert record["problem"] == text
    assert record["text"] == text + "\ufffd"


def test_plain_lines_where_nobody_watches(tmp_path, capsys, monkeypatch):
    from topd.trd import progress

    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    generate(PROBLEMS, student, tmp_path / "a")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 7
    assert lines[0].startswith("rollout: 1 of 6 (ok 1), ")
    assert lines[-1] == "rollout: 6 of 6 (ok 6)"
    with (tmp_path / "a").open("a") as file:
        file.write('{"id": "torn')
    generate(PROBLEMS, student, tmp_path / "a")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "rollout: 6 of 6 answers are in the file already",
        f"{tmp_path / 'a'}: a torn last line of 12 bytes was cut off",
    ]


def test_the_bar_of_a_terminal(tmp_path, monkeypatch):
    pytest.importorskip("rich")
    import io
    import sys

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    generate(PROBLEMS, student, tmp_path / "a")
    shown = sys.stderr.getvalue()
    assert "6/6" in shown
    assert "ok 6" in shown


def test_a_records_line_is_plain_json(tmp_path):
    run(tmp_path / "a")
    first, *lines = (tmp_path / "a").read_text(encoding="utf-8").splitlines()
    assert json.loads(first)["settings"]["stage"] == "rollout"
    assert {"id", "stage", "status", "reason", "text", "finish_reason", "verdict", "attempts"} <= json.loads(lines[0]).keys()
