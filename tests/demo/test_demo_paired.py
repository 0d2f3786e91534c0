"""`topd demo --method trd|opsd|context` from its options to its report, on tiny random models in a folder."""

import html
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
from tiny_demo import QUICK, Page, demo, dying, failing, interrupted, metrics

from topd.cli.main import main
from topd.cli.options import PAIRED_METHODS
from topd_demo import models, run_folder, smollm2
from topd_demo.paired import PairedEvaluation
from topd_demo.paired_report import collapsed
from topd_demo.settings import OF_METHODS, Settings
from topd_demo.training import Run
from topd_demo.wording import Wording

pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("small_evaluations")


def run(pair: list[str], method: str, folder: Path, *words: str) -> int:
    names = pair[2:] if method == "opsd" else pair
    return demo(names, folder, "--method", method, *words)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, pair):
    """The folders of runs that nothing stops, by method."""
    folders = {method: tmp_path_factory.mktemp(method) / "run" for method in PAIRED_METHODS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder, "QUICK", QUICK)
        for method, folder in folders.items():
            assert run(pair, method, folder) == 0
    return folders


@pytest.mark.parametrize("method", PAIRED_METHODS)
def test_metrics_have_every_step_and_evaluation(whole, method):
    records = metrics(whole[method])
    steps = [record for record in records if "loss" in record]
    judged = [record for record in records if "loss" not in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4]
    assert [record["step"] for record in judged] == [0, 2, 4]
    assert all(0 <= record["rollouts_right"] <= 1 for record in steps)
    assert all(("refined_right" in record) == (method == "trd") for record in steps)
    assert all(record["held_out_kl"] > 0 for record in judged)
    assert ["held_out_control" in record for record in judged] == [method != "context", False, False]
    for name in ("ended", "repeated", "distinct"):
        assert all(0 <= record[f"{side}answers_{name}"] <= 1 for record in judged for side in ("", "teacher_"))


@pytest.mark.parametrize("method", PAIRED_METHODS)
def test_page_and_terminal_say_whether_the_answers_are_collapsed(tmp_path, pair, whole, method, capsys):
    """The tiny models are random: they repeat themselves, or do not. One rule decides, and each place says the same."""
    assert main(["demo", "--resume", "--out", str(shutil.copytree(whole[method], tmp_path / "run"))]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    text = html.unescape((whole[method] / "report.html").read_text())
    sentences = [line for line in text.splitlines() if "the answers are" in line]
    assert len(sentences) == 1
    assert sentences[0].partition(">")[2].removesuffix("</p>") in shown
    for row in ("student: answers that end by themselves", "student: repeated 3-grams"):
        assert row in text
        assert row in shown


def test_answers_that_turn_in_a_circle_are_warned_of():
    calm, circling = Wording(0.0, 0.9, 11.0, 1.0), Wording(0.5, 0.3, 24.0, 0.3)
    before, after = (PairedEvaluation(1.0, [], student, calm) for student in (calm, circling))
    warned = collapsed(Run("context", 8, [], before, after))
    assert warned.startswith("Warning: after context the answers are collapsed: 50% of their 3-grams are repeats")
    assert collapsed(Run("context", 8, [], before, before)).startswith("After context the answers are not collapsed")


@pytest.mark.parametrize("method", ["opsd", "context"])
def test_a_teacher_that_never_reads_a_rollout_says_the_same_at_every_evaluation(whole, method):
    shares = [record["held_out_teacher_right"] for record in metrics(whole[method]) if "loss" not in record]
    assert len(set(shares)) == 1


@pytest.mark.parametrize("method", PAIRED_METHODS)
def test_the_page_stands_alone(whole, method):
    text = (whole[method] / "report.html").read_text()
    page = Page(text)
    assert page.tags.count("svg") == 2
    assert page.tags.count("table") == 5  # outcome, two of verdicts, stages, settings
    assert not [link for link in page.links if not link.startswith("#")]
    assert len([title for title in page.titles if title.endswith(" nats")]) > 10
    assert "prefers-color-scheme: dark" in text
    assert (whole[method] / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not [path for path in whole[method].iterdir() if path.name.endswith(".unfinished")]


def test_the_page_says_what_the_teacher_alone_reads(whole):
    reads = {
        method: (whole[method] / "report.html").read_text().partition("What both sides read")[2].partition("Token by token")[0]
        for method in PAIRED_METHODS
    }
    assert "You are a pirate" in reads["context"]
    assert "The right answer is" in reads["opsd"]
    assert "A student&#x27;s answer:" not in reads["opsd"]
    assert "A student&#x27;s answer:" in reads["trd"]


@pytest.mark.parametrize("method", PAIRED_METHODS)
def test_a_killed_run_ends_with_the_same_metrics(tmp_path, pair, whole, method):
    with dying(3):
        assert run(pair, method, tmp_path / "run") == 130
    assert main(["demo", "--resume", "--out", str(tmp_path / "run")]) == 0
    assert metrics(tmp_path / "run") == metrics(whole[method])


def test_ctrl_c_leaves_a_report_and_a_checkpoint(tmp_path, pair, whole, capsys):
    folder = tmp_path / "run"
    with interrupted(3):
        assert run(pair, "trd", folder) == 130
    assert "Stopping after this step" in capsys.readouterr().out
    assert "stopped before its end" in (folder / "report.html").read_text()
    assert main(["demo", "--resume", "--out", str(folder)]) == 0
    assert metrics(folder) == metrics(whole["trd"])


def test_a_checkpoint_of_another_method_names_its_file(tmp_path, pair, whole, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_bytes((whole["trd"] / "config.json").read_bytes())
    (folder / "checkpoint-trd.pt").write_bytes((whole["context"] / "checkpoint-context.pt").read_bytes())
    assert main(["demo", "--resume", "--out", str(folder)]) == 1
    assert f"{folder / 'checkpoint-trd.pt'} is damaged or no checkpoint of this run" in capsys.readouterr().err


def test_plain_output_fits_eighty_columns(tmp_path, pair, monkeypatch, capsys):
    from rich.cells import cell_len

    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    assert run(pair, "context", Path("run")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(cell_len, lines)) <= 80
    assert any(line.startswith("context   4/4") for line in lines)


def test_a_teacher_of_its_own_is_refused_for_self_distillation(capsys, pair, tmp_path):
    line = failing(capsys, "--method", "opsd", *pair, "--out", str(tmp_path / "run"))
    assert "--teacher is not for --method opsd, whose student is its own teacher" in line
    assert not (tmp_path / "run").exists()


def test_self_distillation_needs_peft(capsys, pair, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "peft" else find(name))
    line = failing(capsys, "--method", "opsd", *pair[2:], "--out", str(tmp_path / "run"))
    assert "peft is not installed, and --method opsd needs it: pip install" in line


def test_each_method_stands_alone():
    for methods in (("trd", "opsd"), ("opd", "trd"), ("context", "context")):
        with pytest.raises(ValueError, match="methods must be one or both of opd, topd, or one of trd, opsd, context, got"):
            Settings(methods=methods)
    for method, values in OF_METHODS.items():
        settings = Settings(methods=(method,), **values)
        assert Settings.from_json(json.loads(json.dumps(settings.to_json()))) == settings


@pytest.mark.slow
@pytest.mark.skipif(bool(smollm2.missing()), reason=smollm2.missing() or "installed")
@pytest.mark.parametrize("method", ["trd", "context"])  # opsd: the tiny pair, above
def test_one_step_of_the_real_model(tmp_path, monkeypatch, method):
    monkeypatch.setattr(run_folder, "QUICK", {"held_out": 2, "held_out_tokens": 8, "batch": 2})
    words = ["--quick", "--steps", "1", "--method", method, "--tokens", "8", "--out", str(tmp_path / "run")]
    assert main(["demo", *words]) == 0
    first, step, last = metrics(tmp_path / "run")
    assert min(first["held_out_kl"], step["loss"], last["held_out_kl"]) > 0
    assert first["held_out_kl"] != last["held_out_kl"]
    if method == "context":
        assert (first["held_out_right"], first["held_out_teacher_right"]) == (0, 1)


def test_the_teacher_is_frozen_and_self_distillation_trains_a_lora_alone(pair):
    for method in ("trd", "context"):
        loaded = models.load(Settings(methods=(method,), teacher=pair[1], student=pair[3]))
        assert not any(each.requires_grad for each in loaded.teacher.parameters())
        assert all(each.requires_grad for each in loaded.student.parameters())
    loaded = models.load_with_lora(Settings(methods=("opsd",), student=pair[3]))
    trained = {name for name, each in loaded.student.named_parameters() if each.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
