"""The demo's files when they are not what they should be: config.json, checkpoints, what a kill leaves behind."""

import fcntl
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_demo import QUICK, demo, failing, metrics

from topd import files
from topd.cli.main import main
from topd_demo import run_folder, training
from topd_demo.settings import Settings

pytestmark = pytest.mark.usefixtures("small_evaluations")


def test_settings_survive_json():
    settings = Settings(steps=3, methods=("opd",), teacher="x")
    assert Settings.from_json(json.loads(json.dumps(settings.to_json()))) == settings


def test_files_are_whole_or_absent(tmp_path):
    path = tmp_path / "x.json"
    files.write_json(path, [1])

    def fails(_value, unfinished):
        unfinished.write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        files.save(path, {}, fails)
    assert json.loads(path.read_text()) == [1]
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


RIGHT = Settings().to_json()
WRONG: dict[str, object] = {
    "steps": "8",
    "batch": 0,
    "tokens": 2.0,
    "horizon": True,
    "evaluate_every": 0,
    "held_out": -1,
    "held_out_tokens": None,
    "warmup": -1,
    "seed": 2**32,
    "learning_rate": float("nan"),
    "clip": "1",
    "methods": ["opd", "opd"],
    "left_out": [0, 30],
    "teacher": 3,
    "student": "",
    "device": None,
    "unknown": 1,
}


@pytest.mark.parametrize("name", WRONG)
def test_a_config_with_a_wrong_value_names_it(capsys, tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(RIGHT | {name: WRONG[name]}))
    line = failing(capsys, "--resume", "--out", str(tmp_path))
    assert f"{tmp_path / 'config.json'} cannot be read (" in line
    assert name in line
    assert "--out" in line


@pytest.mark.parametrize("text", ["[]", "3", "null", "", "{", '"opd"', "[" * 100_000, b"\xff\xfe", json.dumps(RIGHT)[:-20]])
def test_a_config_that_is_none(capsys, tmp_path, text):
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert "config.json cannot be read (" in failing(capsys, "--resume", "--out", str(tmp_path))


def test_a_config_without_one_of_its_values_or_that_is_a_folder(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({name: value for name, value in RIGHT.items() if name != "clip"}))
    assert "'clip' is missing" in failing(capsys, "--resume", "--out", str(tmp_path))
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    assert "config.json cannot be read (" in failing(capsys, "--resume", "--out", str(tmp_path))


def test_a_folder_of_an_older_student_is_refused(capsys, tmp_path):
    """Its config.json names the layers of a student of six."""
    older = {name: value for name, value in RIGHT.items() if name != "left_out"} | {"layers": [0, 1, 2, 14, 28, 29]}
    (tmp_path / "config.json").write_text(json.dumps(older))
    line = failing(capsys, "--resume", "--out", str(tmp_path))
    assert "config.json cannot be read ('layers' is no option of a run): start a new run in another folder with --out" in line


def test_a_run_for_a_device_that_is_not_here(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(RIGHT | {"device": "cuda:99"}))
    assert "asks for cuda:99, which is not here" in failing(capsys, "--resume", "--out", str(tmp_path))


class _Foreign:
    """An object that torch does not load without being told to trust it."""


CHECKPOINTS: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no checkpoint"),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1000]),
    "foreign object": lambda path: torch.save(_Foreign(), path),
    "foreign values": lambda path: torch.save({"model": {"weight": torch.ones(2)}}, path),
    "another type": lambda path: torch.save([1, 2], path),
    "another method": lambda path: change(path, lambda state: setattr(state["run"], "method", "topd")),
    "too many steps": lambda path: change(path, lambda state: setattr(state["run"], "done", 5)),
    "no evaluation": lambda path: change(path, lambda state: setattr(state["run"], "before", None)),
    "another model": lambda path: change(path, lambda state: state["student"].popitem()),
    "another optimizer": lambda path: change(path, lambda state: state["optimizer"].update(param_groups=[])),
    "folder": lambda path: (path.unlink(), path.mkdir()),
}


def change(path: Path, edit: Callable[[Any], object]) -> None:
    with torch.serialization.safe_globals(training.CHECKPOINT_TYPES):
        state = torch.load(path, weights_only=True)
    edit(state)
    torch.save(state, path)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, pair) -> Path:
    """The folder of a run that was killed after OPD's first checkpoint."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    step = training.Trainer._step

    def dying(self, index):
        if index == 3:
            raise KeyboardInterrupt
        return step(self, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder, "QUICK", QUICK)
        patch.setattr(training.Trainer, "_step", dying)
        assert demo(pair, folder) == 130
    return folder


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_checkpoint_that_is_none_names_its_file(capsys, tmp_path, stopped, kind):
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    CHECKPOINTS[kind](folder / "checkpoint-opd.pt")
    assert main(["demo", "--resume", "--out", str(folder)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"topd demo: {folder / 'checkpoint-opd.pt'} is damaged or no checkpoint of this run: remove it to begin"
    )
    assert "weights_only" not in line
    assert "topd's own" not in line


def test_what_the_line_advises_helps(tmp_path, stopped):
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    (folder / "checkpoint-opd.pt").unlink()
    assert main(["demo", "--resume", "--out", str(folder)]) == 0
    assert len([record for record in metrics(folder) if "loss" in record]) == 8


def test_the_next_start_removes_what_a_killed_run_left(tmp_path, pair, stopped):
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    ours = [folder / f".{name}.4242.unfinished" for name in ("checkpoint-opd.pt", "checkpoint-topd.pt", "report.html")]
    others = [folder / name for name in (".thesis.4242.unfinished", ".checkpoint-opd.pt.unfinished", "checkpoint-opd.pt.4242")]
    for path in (*ours, *others):
        path.write_text("half")
    assert main(["demo", "--resume", "--out", str(folder)]) == 0
    assert not [path for path in ours if path.exists()]
    assert all(path.read_text() == "half" for path in others)


def test_a_file_that_another_process_writes_stays(tmp_path):
    code = "import sys, pathlib; from topd import files\nwith files.whole(pathlib.Path(sys.argv[1])) as unfinished:\n"
    code += "    unfinished.write_text('half'); print(unfinished, flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "x.pt")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    unfinished = Path(process.stdout.readline().strip())
    files.remove_leftovers(tmp_path, ["x.pt"])
    assert unfinished.read_text() == "half"
    process.kill()  # in the middle of the file
    process.wait()
    assert unfinished.exists()
    files.remove_leftovers(tmp_path, ["y.pt"])
    assert unfinished.exists()
    files.remove_leftovers(tmp_path, ["x.pt"])
    assert list(tmp_path.iterdir()) == []


def test_a_file_taken_before_it_was_locked_is_opened_again(tmp_path, monkeypatch):
    lock, calls = fcntl.flock, []

    def late(file, operation):
        calls.append(operation)
        if len(calls) == 1:  # another process took it for a leftover
            next(tmp_path.iterdir()).unlink()
        lock(file, operation)

    monkeypatch.setattr(files.fcntl, "flock", late)
    files.write_text(tmp_path / "x", "whole")
    assert (tmp_path / "x").read_text() == "whole"
    assert len(calls) == 2
