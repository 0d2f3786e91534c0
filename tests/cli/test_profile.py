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


CONFIG = {"hidden_size": 64, "vocab_size": 1000, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}


def folders(tmp_path, **teacher):
    for name, own in (("student", {}), ("teacher", teacher)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(CONFIG | own))
    return ["profile", "--student", str(tmp_path / "student"), "--teacher", str(tmp_path / "teacher")]


@pytest.mark.parametrize("method", ["opd", "topd", "trd"])
def test_a_step_of_each_method_and_its_shards(method, capsys, tmp_path):
    report = tmp_path / "out.json"
    words = folders(tmp_path)
    assert main([*words, "--method", method, "--tp", "8", "--tokens", "4000", "--checkpointing", "--json", str(report)]) == 0
    out, written = capsys.readouterr().out, json.loads(report.read_text())
    assert written["case"]["loss"] == ("forward_kl" if method == "trd" else "reverse_kl")
    assert f"a step of {method}, PREDICTED: 4,000 tokens, the teacher reads {8000 if method == 'trd' else 4000:,}" in out
    assert ("90 candidates with windows of 50 tokens" in out) == (method == "topd")
    assert "among 8 ranks, PREDICTED, of the loss alone" in out
    assert "280 B of statistics (top, rest)" in out
    assert written["step"]["seconds"] == pytest.approx(sum(stage["seconds"] for stage in written["step"]["stages"]))


def test_a_mixture_of_experts_is_said_to_be_unknown(capsys, tmp_path):
    assert main([*folders(tmp_path, num_experts=8), "--method", "opd"]) == 0
    out = capsys.readouterr().out
    assert "a mixture of experts (num_experts in its config)" in out
    assert "no sum: a stage's time is not predicted" in out


def test_sizes_below_a_gib_are_in_mib(capsys):
    assert main(["profile", "--hidden", "64", "--vocab", "1000", "--tokens", "100"]) == 0
    out = capsys.readouterr().out
    assert "GiB" not in out.split("peak memory")[1].split("fits")[0]
    assert "  topd " in out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--trace", "x.json"], "--trace must stand beside --run"),
        (["--tp", "8", "--run"], "--tp must not stand beside --run"),
        (["--length", "9"], "--length must stand beside --method"),
        (["--method", "opd", "--length", "9"], "--length must stand beside --method topd"),
        (["--json", "/no/such/folder/x.json"], "/no/such/folder must be a folder"),
        ([], "--student and --teacher, or --hidden and --vocab, must be given"),
        (["--hidden", "64"], "--student and --teacher, or --hidden and --vocab, must be given"),
        (["--student", "x"], "--teacher must be given too"),
        (["--student", "x", "--teacher", "y", "--vocab", "9"], "--vocab must not stand beside --student"),
    ],
)
def test_words_that_contradict_each_other_are_refused(words, line, capsys):
    assert main(["profile", *words]) == 1
    assert line in capsys.readouterr().err
