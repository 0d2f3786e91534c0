"""`topd demo` from its options to its report, on tiny random models in a folder."""

import json
import signal
from pathlib import Path

import pytest
import torch
from tiny_demo import QUICK, Page, demo, dying, interrupted, metrics, saved, tokenizer

import topd
from topd.cli.main import main
from topd_demo import models, prompts, run_folder, smollm2, training
from topd_demo.display import Display, one_line
from topd_demo.figures import NAMES
from topd_demo.settings import Settings
from topd_demo.window_pair import furthest_pair

pytestmark = pytest.mark.usefixtures("small_evaluations")


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, pair):
    """A run that nothing stops; its folder."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder, "QUICK", QUICK)
        assert demo(pair, folder) == 0
    return folder


def test_the_folder_holds_the_report(whole_run):
    names = {path.name for path in whole_run.iterdir()}
    assert {"report.html", "curves.png", "windows.png", "metrics.jsonl", "config.json"} <= names
    assert not [name for name in names if name.endswith(".unfinished")]
    for name in ("curves.png", "windows.png"):
        assert (whole_run / name).read_bytes().startswith(b"\x89PNG")


def test_metrics_have_every_step_and_evaluation(whole_run):
    records = metrics(whole_run)
    steps = [(r["method"], r["step"]) for r in records if "loss" in r]
    judged = [(r["method"], r["step"]) for r in records if "held_out_reverse_kl" in r]
    assert steps == [(method, step) for method in ("opd", "topd") for step in (1, 2, 3, 4)]
    assert judged == [(method, step) for method in ("opd", "topd") for step in (0, 2, 4)]
    first, second = (next(r for r in records if r["method"] == method) for method in ("opd", "topd"))
    assert first["held_out_reverse_kl"] == second["held_out_reverse_kl"]  # the same start


def test_both_methods_begin_with_the_same_rollouts(whole_run):
    opd, topd = (next(r for r in metrics(whole_run) if r["method"] == m and r["step"] == 1) for m in ("opd", "topd"))
    assert opd["opd_loss"] == pytest.approx(topd["opd_loss"], rel=1e-6)
    assert topd["candidates"] >= 1


def test_the_page_stands_alone(whole_run):
    page = Page((whole_run / "report.html").read_text())
    assert page.tags.count("svg") == 3
    assert page.tags.count("table") == 5
    assert not [link for link in page.links if not link.startswith("#")]
    assert "prefers-color-scheme: dark" in page.text
    head, _, rest = page.text.partition("</style>")[2].partition("What the student says")
    assert "$" not in head + rest.partition("Learned, or collapsed?")[2].partition("Two near futures")[0]


@pytest.mark.parametrize("fail_at", [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(5, marks=pytest.mark.slow)])
def test_a_killed_run_ends_with_the_same_metrics(tmp_path, pair, whole_run, fail_at):
    """It dies in the middle of a step, before and after a checkpoint, in the first and in the second method."""
    with dying(fail_at):
        assert demo(pair, tmp_path / "run") == 130
    assert main(["demo", "--resume", "--out", str(tmp_path / "run")]) == 0
    assert metrics(tmp_path / "run") == metrics(whole_run)


def test_ctrl_c_leaves_a_report_and_a_checkpoint(tmp_path, pair, whole_run, capsys):
    before = signal.getsignal(signal.SIGINT)
    folder = tmp_path / "run"
    with interrupted(3):
        assert demo(pair, folder) == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert "Stopping after this step" in (out := capsys.readouterr().out)
    assert f"--resume --out {folder}" in out.replace("\n", "")
    assert "stopped before its end" in (folder / "report.html").read_text()
    assert [r["step"] for r in metrics(folder) if "loss" in r] == [1, 2, 3]
    assert main(["demo", "--resume", "--out", str(folder)]) == 0
    assert metrics(folder) == metrics(whole_run)


@pytest.mark.slow
@pytest.mark.skipif(bool(smollm2.missing()), reason=smollm2.missing() or "installed")
def test_one_step_of_the_real_model(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "QUICK", {"held_out": 2, "held_out_tokens": 6, "horizon": 6, "batch": 2})
    assert main(["demo", "--quick", "--steps", "1", "--method", "topd", "--tokens", "8", "--out", str(tmp_path / "run")]) == 0
    first, step, last = metrics(tmp_path / "run")
    assert min(first["held_out_reverse_kl"], step["opd_loss"], last["held_out_reverse_kl"]) > 0.3  # it lacks six layers
    assert len(json.loads((tmp_path / "run" / "config.json").read_text())["left_out"]) == models.LEFT_OUT
    assert first["held_out_reverse_kl"] != last["held_out_reverse_kl"]
    assert step["student_branches"] == step["teacher_branches"] == 1


def test_the_student_lacks_the_least_layers_or_those_of_the_config(tmp_path, monkeypatch):
    teacher = models._pretrained(saved(tmp_path / "teacher", 8, 0), "teacher")
    monkeypatch.setattr(models, "_teacher", lambda _settings: (teacher, tokenizer()))
    first = models.load(Settings())
    assert first.left_out is not None
    assert (len(first.left_out), len(first.student.model.layers)) == (models.LEFT_OUT, 2)
    assert f"lacks {', '.join(map(str, first.left_out))} of its 8 layers (counted from 0)" in first.description
    other = models.load(Settings(left_out=(3,)))  # a run that goes on: whatever would be found now
    assert (other.left_out, len(other.student.model.layers)) == ((3,), 7)


def test_one_method_and_its_report(tmp_path, pair):
    assert demo(pair, tmp_path / "run", "--method", "opd", "--steps", "1") == 0
    assert not (tmp_path / "run" / "windows.png").exists()
    assert "TOPD did not run" in (tmp_path / "run" / "report.html").read_text()


def test_plain_output_fits_eighty_columns(tmp_path, pair, monkeypatch, capsys):
    from rich.cells import cell_len

    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    assert demo(pair, Path("run")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(cell_len, lines)) <= 80
    assert any(line.startswith("TOPD   4/4") for line in lines)


def test_prompts_repeat_and_do_not_leak():
    questions = prompts.make_prompts(40, 12, 3)
    assert questions == prompts.make_prompts(40, 12, 3)
    assert questions != prompts.make_prompts(40, 12, 4)
    assert (len(questions.train), len(questions.held_out)) == (40, 12)
    assert not set(questions.train) & set(questions.held_out)
    assert sum(prompt in prompts.CHAT for prompt in questions.train) == 30
    assert max(map(len, questions.train + questions.held_out)) <= prompts.LONGEST


def test_prompts_are_padded_on_the_left():
    ids, attended = prompts.encode(tokenizer(), ["ab", "a"], torch.device("cpu"))
    words = tokenizer().get_vocab()
    assert ids.tolist() == [[words["a"], words["b"]], [0, words["a"]]]
    assert attended.tolist() == [[1, 1], [0, 1]]


def test_the_widest_line_fits_eighty_columns():

    evaluations = {"topd": {"held_out_reverse_kl": 10.24}, "context": {"held_out_kl": 10.24, "held_out_right": 1.0}}
    for method, evaluation in evaluations.items():
        display = Display(Settings(steps=100))
        display.method, display.latest = method, {"step": 0}
        display.show({"step": 100} | evaluation)
        display.began, display.first = display.began - 1000, 0
        display.latest = {"step": 100, "loss": 10.24, "tokens_a_second": 120.0, "memory_mib": 12.1 * 1024}
        text = display._numbers().rpartition("in ")[0] + "12:34 left"
        assert len(f"{NAMES[method]} {'-' * 6} {text}") <= 80


def test_the_learning_rate_rises_and_falls():
    assert [training.schedule(i, 6, 2) for i in range(6)] == pytest.approx([0.5, 1.0, 1.0, 0.7, 0.4, 0.1])
    assert training.schedule(0, 1, 0) == 1.0


def test_a_window_pair_names_its_prefix_and_its_heaviest_links():
    words = tokenizer()
    ids = torch.tensor([words("abcdef")["input_ids"]])
    windows = topd.Windows(
        torch.tensor([[0, 2], [0, 4]]),
        torch.tensor([words("xy")["input_ids"]] * 2),
        torch.tensor([words("uv")["input_ids"]] * 2),
        torch.tensor([2, 1]),
        torch.tensor([2, 2]),
    )
    plan = torch.tensor([[[0.5, 0.0], [0.0, 0.5]], [[0.3, 0.7], [0.0, 0.0]]])
    transport = topd.Transport(torch.tensor([0.1, 0.4]), plan, torch.zeros(2))
    pair = furthest_pair(topd.NearFuture(windows, transport, torch.tensor([False, True]), torch.zeros(1, 6)), ids, words)
    assert (pair.prefix, pair.student_tokens, pair.teacher_tokens, pair.divergent) == ("abcd", ["x"], ["u", "v"], True)
    assert pair.heaviest(5) == [("x", "v", pytest.approx(0.7)), ("x", "u", pytest.approx(0.3))]
    assert (
        furthest_pair(topd.NearFuture(windows, transport, torch.zeros(0, dtype=torch.bool), torch.zeros(1, 6)), ids, words)
        is None
    )


def test_a_models_text_cannot_steer_the_terminal():
    assert one_line("a\n b\t\x1b[31mc\x07") == "a b ·[31mc·"
