"""`topd profile --run`: each way in a fresh process, refused where it does not fit."""

import json

import pytest

from topd.cli import profile_run
from topd.cli.main import main
from topd.profiling.recorder import COPIES, HOST, PRODUCTS, ROWS, kind_of

SMALL = [
    "profile",
    "--run",
    "--hidden",
    "32",
    "--teacher-hidden",
    "48",
    "--vocab",
    "2000",
    "--tokens",
    "200",
    "--dtype",
    "fp32",
]


def test_a_run_measures_what_is_installed(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(profile_run, "installed", lambda: ["eager", "topd"])
    trace, report = tmp_path / "trace.json", tmp_path / "report.json"
    assert main([*SMALL, "--device", "cpu", "--trace", str(trace), "--json", str(report)]) == 0
    out, written = capsys.readouterr().out, json.loads(report.read_text())
    ways = written["measured"]["ways"]
    assert ways["TRL"] == {"left_out": "not installed"}
    assert ways["eager"]["seconds"] > 0
    kinds = ways["topd"]["kinds"]
    assert set(kinds) == {PRODUCTS, ROWS, COPIES, HOST}
    assert kinds[PRODUCTS] > 0
    assert "PREDICTION" in out
    assert "MEASURED on" in out
    assert json.loads(trace.read_text())["traceEvents"]


def test_what_does_not_fit_is_refused_and_eager_alone_is_left_out(capsys, monkeypatch):
    monkeypatch.setattr(profile_run, "free_bytes", lambda device: 1 << 20)
    assert main([*SMALL, "--device", "cpu"]) == 1
    assert "take fewer --tokens or a smaller --vocab" in capsys.readouterr().err
    monkeypatch.setattr(profile_run, "free_bytes", lambda device: 9 << 20)  # topd needs 6 MiB, eager 12
    monkeypatch.setattr(profile_run, "installed", lambda: ["eager", "topd"])
    monkeypatch.setattr(profile_run, "_in_a_process", lambda asked: {"peak_mib": 4.0, "seconds": 0.1, "kinds": {PRODUCTS: 1.0}})
    assert main([*SMALL, "--device", "cpu"]) == 0
    assert "eager   left out: needs about" in capsys.readouterr().out


def test_a_measurement_that_fails_says_its_last_line():
    asked = {"name": "eager", "loss": "reverse_kl", "dtype": "no_dtype", "device": "cpu"}
    assert profile_run._in_a_process(asked)["left_out"].startswith("failed: AttributeError")


@pytest.mark.slow
def test_predicted_peaks_are_within_a_tenth_of_the_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(profile_run, "ROUNDS", 1)
    report = tmp_path / "report.json"
    words = [
        "profile",
        "--run",
        "--hidden",
        "576",
        "--vocab",
        "49152",
        "--tokens",
        "512",
        "--dtype",
        "fp32",
        "--device",
        "cpu",
    ]
    assert main([*words, "--loss", "jsd", "--json", str(report)]) == 0
    written = json.loads(report.read_text())
    for name, way in written["measured"]["ways"].items():
        if "left_out" not in way:
            predicted = sum(written["memory_bytes"][name].values()) / 2**20
            assert way["peak_mib"] == pytest.approx(predicted, rel=0.1), name


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::mm", PRODUCTS),
        ("aten::addmm_", PRODUCTS),
        ("topd::bf16_addmm", PRODUCTS),
        ("nvjet_tst_128x256", PRODUCTS),
        ("topd::divergence_rows", ROWS),
        ("sweep", ROWS),
        ("aten::_log_softmax", ROWS),
        ("aten::copy_", COPIES),
        ("Memcpy DtoD (Device -> Device)", COPIES),
        ("aten::slice", HOST),
        ("aten::empty_strided", HOST),
        ("topd::linear_divergence", HOST),
        ("aten::transpose", HOST),
    ],
)
def test_kinds_of_work(name, kind):
    assert kind_of(name) == kind
