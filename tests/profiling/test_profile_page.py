"""docs/profile.md: its loop runs, and its predictions are what the commands print today."""

import json
import re
from pathlib import Path

import pytest
import torch
from objective_cases import batch_of, models

from topd.cli.main import main

PAGE = (Path(__file__).parents[2] / "docs" / "profile.md").read_text()
# What the configs of Qwen3-8B and Qwen3-14B say.
QWEN = {"vocab_size": 151_936, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False}
SMALL = {"hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "intermediate_size": 12_288}
LARGE = {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "intermediate_size": 17_408}


def test_the_loop_runs_as_printed(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    (loop,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    student, teacher = models()
    names = {"student": student, "teacher": teacher, "batch": batch_of(), "optimizer": torch.optim.AdamW(student.parameters())}
    exec(compile(loop, "profile.md", "exec"), names)
    assert names["profile"].report.calls == 3
    assert capsys.readouterr().out.startswith("profile of OPD on cpu")
    assert {path.name for path in tmp_path.iterdir()} == {"profile.json", "profile.png"}


def test_the_loss_is_predicted_as_printed(capsys):
    assert main(["profile", "--hidden", "4096", "--teacher-hidden", "5120", "--vocab", "151936"]) == 0
    assert capsys.readouterr().out.strip() in PAGE


def test_the_step_and_the_shards_are_predicted_as_printed(capsys, tmp_path):
    for name, config in (("student", SMALL), ("teacher", LARGE)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(QWEN | config))
    words = ["--student", str(tmp_path / "student"), "--teacher", str(tmp_path / "teacher")]
    assert main(["profile", *words, "--method", "topd", "--checkpointing", "--tp", "8"]) == 0
    step, shards = capsys.readouterr().out.strip().split("\n\n")[-2:]
    assert step in PAGE
    assert shards in PAGE
