"""The command: a short run is paired, repeats, is resumed and told of in tables; the same row gives the same numbers."""

import json
import re
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from quality import experiment
from quality.settings import SETTINGS
from quality.tables import areas
from quality.training import Job, run

SHORT = {
    name: replace(settings, teacher_steps=3, student_most_steps=1, steps=3, batch=4, evaluate_every=2, problems=16)
    for name, settings in SETTINGS.items()
}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(experiment, "SETTINGS", SHORT)


def test_a_row_run_twice_gives_the_same_numbers(tmp_path):
    jobs = [Job("sorting", 0, row, SHORT["sorting"], tmp_path) for row in ("topd", "topd", "oracle")]
    first, again, other = (run(job, lambda text: None) for job in jobs)
    assert first == again
    assert first["reverse_kl"][0] == other["reverse_kl"][0]  # the same start, prompts and rollouts
    assert first["reverse_kl"] != other["reverse_kl"]
    assert [point["step"] for point in first["curve"]] == [0, 2, 3]
    flop = [point["flop"] for point in first["curve"]]
    assert flop[0] == 0 < flop[1] < flop[2]
    counts = [
        sum(third[key] for key in ("real_divergent", "real_alarm", "surface_divergent", "surface_alarm"))
        for third in first["gate"]
    ]
    assert all(4 <= count <= 12 for count in counts)  # 4 answers a step, up to 3 candidates each


def test_the_command_does_what_is_missing_and_prints_what_is_there(tmp_path, capsys, monkeypatch):
    words = ["--tasks", "addition", "--steps", "2", "--jobs", "1", "--out", str(tmp_path)]
    assert experiment.main([*words, "--rows", "opd", "topd", "--seeds", "1"]) == 0
    lines = (tmp_path / "addition.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in lines] == ["opd", "topd"]
    assert (tmp_path / "addition.png").stat().st_size > 10_000
    assert re.search(r"TOPD, lambda 0\.1 +\| 1 ", capsys.readouterr().out)
    done = []
    monkeypatch.setattr(experiment, "run", lambda job, report: done.append((job.seed, job.row)) or run(job, report))
    assert experiment.main([*words, "--rows", "opd", "topd", "--seeds", "2"]) == 0
    assert done == [(1, "opd"), (1, "topd")]
    assert (tmp_path / "addition.jsonl").read_text().splitlines()[0] == lines[0]
    with pytest.raises(ValueError, match="other settings; take another --out"):
        experiment.main([*words[:3], "3", *words[4:], "--rows", "opd"])


def test_an_interrupt_keeps_what_had_ended(tmp_path, monkeypatch):
    def interrupted(job, report):
        if job.row == "opd_jsd":
            raise KeyboardInterrupt
        return run(job, report)

    monkeypatch.setattr(experiment, "run", interrupted)
    words = ["--tasks", "addition", "--rows", "opd", "opd_jsd", "--seeds", "1", "--jobs", "1", "--out", str(tmp_path)]
    threads = torch.get_num_threads()
    assert experiment.main(words) == experiment.INTERRUPTED
    assert len((tmp_path / "addition.jsonl").read_text().splitlines()) == 1
    assert torch.get_num_threads() == threads


def test_an_area_is_that_of_the_curve():
    curve = [{"step": 0, "flop": 0.0, "accuracy": 0.0}, {"step": 4, "flop": 2.0, "accuracy": 1.0}]
    assert areas({"curve": curve}, "step", 4) == 0.5
    assert areas({"curve": curve}, "flop", 1.0) == 0.25
