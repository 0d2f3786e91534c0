"""The file of a run: torn lines, other settings, repeated ids, two writers, a full disk."""

import json
import os

import pytest

from topd.trd import read_run
from topd.trd.records import Journal

SETTINGS = {"stage": "rollout", "temperature": 0.6, "templates": {"student": "a" * 100}}


def record(id_: str, status: str = "ok", **fields):
    return {"id": id_, "status": status, "attempts": 1, "problem": f"p{id_}", "text": "é\u2028\n🙂", **fields}


def written(path, *ids, **fields):
    with Journal(path, SETTINGS) as journal:
        for id_ in ids:
            journal.append(record(id_, **fields))


def test_a_run_is_read_as_it_was_written(tmp_path):
    written(tmp_path / "deep" / "run.jsonl", "a", "b")
    settings, records = read_run(tmp_path / "deep" / "run.jsonl")
    assert settings == SETTINGS
    assert list(records) == [record("a"), record("b")]
    assert len((tmp_path / "deep" / "run.jsonl").read_bytes().splitlines()) >= 3


def test_wherever_a_kill_tears_the_file_it_goes_on(tmp_path):
    """At the ends of lines, beside them, and at places between."""
    path = tmp_path / "run.jsonl"
    written(path, "a", "b")
    whole = path.read_bytes()
    ends = [position + 1 for position, byte in enumerate(whole) if byte == ord("\n")]
    for length in sorted({*range(0, len(whole), 31), *(end + shift for end in ends[:-1] for shift in (-1, 0, 1))}):
        path.write_bytes(whole[:length])
        with Journal(path, SETTINGS) as journal:
            kept = list(journal.known)
            assert kept == ["a", "b"][: max(0, whole[:length].count(b"\n") - 1)]
            for id_ in ("a", "b"):
                if id_ not in kept:
                    journal.append(record(id_))
        assert path.read_bytes() == whole


def test_other_settings_are_refused_by_name_and_value(tmp_path):
    path = tmp_path / "runs.jsonl"
    written(path, "a")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"^temperature is 0.6 in runs.jsonl, got 0.8; take another file$"):
        Journal(path, {**SETTINGS, "temperature": 0.8})
    with pytest.raises(
        ValueError, match=r"^stage is rollout in runs.jsonl, got refine and top_k is None in runs.jsonl, got 5;"
    ):
        Journal(path, {**SETTINGS, "stage": "refine", "top_k": 5})
    with pytest.raises(ValueError, match=r"^templates in runs.jsonl differs from what was given; take another file$"):
        Journal(path, {**SETTINGS, "templates": {"student": "b"}})
    assert path.read_bytes() == before


def test_another_kind_of_file_is_left_alone(tmp_path):
    for text in ('{"problem": "x"}\n', "hello", '{"topd.trd": 1, "settings": 5}\n', '{"topd.trd": 1, "settings": {"a\n'):
        (tmp_path / "notes").write_text(text)
        with pytest.raises(ValueError, match="does not begin with a run's settings: it is another kind of file"):
            Journal(tmp_path / "notes", SETTINGS)
        assert (tmp_path / "notes").read_text() == text
        with pytest.raises(ValueError, match="another kind of file"):
            read_run(tmp_path / "notes")


def test_a_repeated_id_and_a_broken_line_are_refused(tmp_path):
    path = tmp_path / "run.jsonl"
    written(path, "a", "b")
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([*lines[:2], lines[1], *lines[2:]]))
    with pytest.raises(ValueError, match=r"line 3 of .* repeats the id 'a'"):
        Journal(path, SETTINGS)
    path.write_bytes(b"\n".join([lines[0], b'{"id": 3', *lines[2:]]))
    with pytest.raises(ValueError, match=r"line 2 of .* is no record of a run"):
        Journal(path, SETTINGS)
    written(tmp_path / "other.jsonl", "a")
    with Journal(tmp_path / "other.jsonl", SETTINGS) as journal, pytest.raises(ValueError, match=r"'a' is in .* already"):
        journal.append(record("a"))


def test_two_writers_are_refused(tmp_path):
    pytest.importorskip("fcntl")
    with (
        Journal(tmp_path / "run.jsonl", SETTINGS),
        pytest.raises(RuntimeError, match=r"run.jsonl is being written by another process; wait for it"),
    ):
        Journal(tmp_path / "run.jsonl", SETTINGS)
    Journal(tmp_path / "run.jsonl", SETTINGS).close()


def test_failed_records_are_taken_out_whole(tmp_path):
    path = tmp_path / "run.jsonl"
    with Journal(path, SETTINGS) as journal:
        journal.append(record("a"))
        journal.append(record("b", "failed", attempts=6))
        journal.append(record("c", "refused"))
    with Journal(path, SETTINGS, retry_failed=True) as journal:
        assert list(journal.known) == ["a", "c"]
        assert journal.earlier_attempts == {"b": 6}
        if os.name == "posix":
            with pytest.raises(RuntimeError, match="another process"):
                Journal(path, SETTINGS)
        journal.append(record("b"))
    assert [each["id"] for each in read_run(path)[1]] == ["a", "c", "b"]
    assert [each.name for each in tmp_path.iterdir()] == ["run.jsonl"]


def test_a_full_disk_leaves_no_torn_record(tmp_path, monkeypatch):
    path = tmp_path / "run.jsonl"
    written(path, "a")
    before, write = path.read_bytes(), os.write

    def full(file, data):
        if len(data) > 20:
            return write(file, data[:20])
        raise OSError(28, "No space left on device")

    with Journal(path, SETTINGS) as journal:
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left"):
            journal.append({**record("b"), "text": "x" * 33})
        monkeypatch.undo()
        assert path.read_bytes() == before
        journal.append(record("b"))
    assert len(path.read_bytes().split(b"\n")) == 4


def test_half_a_surrogate_pair_goes_through_the_file(tmp_path):
    written(tmp_path / "run.jsonl", "a", note="\ud800")
    assert next(read_run(tmp_path / "run.jsonl")[1])["note"] == "\ud800"
    assert all(json.loads(line) for line in (tmp_path / "run.jsonl").read_bytes().splitlines())
