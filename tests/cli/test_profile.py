"""`topd profile`."""

import json

import pytest

from topd.cli.main import main

NUMBERS = ["--hidden", "4096", "--teacher-hidden", "5120", "--vocab", "151936"]


def test_a_prediction_says_that_it_is_one(capsys, tmp_path):
    path = tmp_path / "out.json"
    assert main(["profile", *NUMBERS, "--device", "h100", "--json", str(path)]) == 0
    out, report = capsys.readouterr().out, json.loads(path.read_text())
    assert out.startswith("PREDICTION, nothing was measured: reverse_kl of 8,192 tokens")
    assert "chunks      2 of up to 4,096 rows" in out  # the account's plan
    assert report["plan"]["flop"] == 2 * 8192 * 151_936 * (3 * 4096 + 5120)
    peaks = {name: sum(parts.values()) for name, parts in report["memory_bytes"].items()}
    assert peaks["eager"] == 6 * 4 * 8192 * 151_936
    assert peaks["topd"] == report["plan"]["peak_bytes"]
    assert report["never_allocated_bytes"] == peaks["eager"] - peaks["topd"]
    assert report["time"]["bound"] == "products"
    assert report["fits"]["fits"] == {"eager": True, "TRL": True, "topd": True}


def test_two_folders_on_a_cpu(capsys, tmp_path):
    for name, width in (("small", 64), ("large", 128)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"hidden_size": width, "vocab_size": 1000}))
    models = ["--student", str(tmp_path / "small"), "--teacher", str(tmp_path / "large")]
    assert main(["profile", *models, "--device", "cpu", "--dtype", "fp32", "--frozen-head"]) == 0
    out = capsys.readouterr().out
    assert "hidden 64 (teacher 128), fp32, frozen head, cpu" in out
    assert "time        not predicted" in out
    assert "d weight in float32" not in out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "--student and --teacher, or --hidden and --vocab, must be given"),
        (["--hidden", "64"], "--student and --teacher, or --hidden and --vocab, must be given"),
        (["--student", "x"], "--teacher must be given too"),
        (["--student", "x", "--teacher", "y", "--vocab", "9"], "--vocab must not stand beside --student"),
    ],
)
def test_words_that_contradict_each_other_are_refused(words, line, capsys):
    assert main(["profile", *words]) == 1
    assert line in capsys.readouterr().err
