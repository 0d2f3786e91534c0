"""`topd doctor` and the command's own words."""

import re
import subprocess
import sys

import pytest

import topd
from topd import memory
from topd.backends import missing_extension
from topd.cli import doctor
from topd.cli.main import main, parser


def test_doctor_finds_everything_in_order(capsys):
    complete = missing_extension() is None
    assert main(["doctor"]) == (0 if complete else 1)
    out = capsys.readouterr().out
    for word in ("python", "torch", "transformers", "reference", "eager", "cpp", "triton", "threads", "memory", "self-check"):
        assert f"  {word}" in out or word == "self-check"
    assert ("checks passed" if complete else "1 of") in out
    assert out.count("FAILED") == (0 if complete else 1)


def test_doctor_says_first_that_the_extension_is_missing(capsys, without_extension, recwarn):
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert out.startswith(f"{without_extension}\n\nversions\n")
    assert re.search(r"^  cpp, cpu +FAILED", out, re.MULTILINE)
    assert "1 of" in out
    assert out.count("FAILED") == 1
    assert not [each for each in recwarn if "eager" in str(each.message)]  # said once, not warned of beside


def test_doctor_passes_on_a_processor_that_no_build_runs_on(without_extension, monkeypatch):
    monkeypatch.setattr(sys.modules["topd.backends"], "_variants", list)
    assert "cpp, cpu" not in {check.name for check in doctor.checks()}


def test_doctor_checks_each_backend_that_runs_here():
    names = {check.name.partition(",")[0] for check in doctor.checks()}
    runs = {name for name, backend in topd.backends().items() if backend and not backend.interpreted}
    assert names - {"cpp"} == runs - {"cpp"} | {"transport"}
    assert ("cpp" in names) == bool(topd.backends()["cpp"] or missing_extension())


def test_doctor_says_what_is_wrong(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "loss_error", lambda backend, device: 1.0 if backend == "eager" else 0.0)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "FAILED  largest relative error 1e+00" in out
    assert ("2 of" if missing_extension() else "1 of") in out


def test_doctor_says_that_a_version_is_outside_of_its_range(monkeypatch):
    ranges = ['transformers<5.24,>=4.56.2; extra == "transformers"', 'transformers>=5.23; extra == "demo"', "torch>=2.13"]
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: ranges)
    assert doctor.remark("transformers", "5.23.0") == ""
    assert doctor.remark("transformers", "5.24.0") == ', outside of <5.24,>=4.56.2: pip install "topd[transformers]"'
    assert doctor.remark("peft", "0.1") == ""


def test_doctor_says_whose_block_sizes_a_gpu_takes(monkeypatch):
    blocks = pytest.importorskip("topd_kernels.shared.blocks", reason="triton is not installed")
    monkeypatch.setattr(blocks, "described", lambda device: f"those of sm_90 on {device}")
    assert doctor.block_sizes(1) == "those of sm_90 on cuda:1"

    def refused(device):
        raise ValueError("the file must be JSON")

    monkeypatch.setattr(blocks, "described", refused)
    assert doctor.block_sizes(1) == "REFUSED: the file must be JSON"


def test_a_check_that_breaks_is_a_check_that_fails(monkeypatch):
    def broken() -> float:
        raise RuntimeError("no such kernel\nat all")

    check = doctor._checked("transport", broken)
    assert not check.passed
    assert check.detail == "RuntimeError: no such kernel"


def test_the_self_check_sees_a_wrong_gradient(monkeypatch):
    exact = topd.linear_divergence

    def wrong(hidden, *arguments, backend, **options):
        loss = exact(hidden, *arguments, backend=backend, **options)
        return loss if backend == "reference" else loss + 1e-3 * hidden.sum(-1)

    monkeypatch.setattr(topd, "linear_divergence", wrong)
    assert doctor.loss_error("eager", "cpu") > doctor.TOLERANCE


def test_help_fits_eighty_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    for words in (["--help"], ["demo", "--help"], ["doctor", "--help"], ["refine", "--help"]):
        with pytest.raises(SystemExit) as stopped:
            parser().parse_args(words)
        assert stopped.value.code == 0
        assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_wrong_words_are_one_line(capsys):
    for words in ([], ["dome"], ["demo", "--steps", "0"]):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"topd {topd.__version__}\n"


def test_the_module_is_a_command():
    done = subprocess.run([sys.executable, "-m", "topd.cli.main", "--help"], capture_output=True, text=True, check=True)
    assert "doctor" in done.stdout


def test_a_reader_that_has_enough_is_no_error():
    command = [sys.executable, "-m", "topd.cli.main", "doctor"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        errors = process.stderr.read()
    assert (process.wait(), errors) == (141, "")


@pytest.mark.parametrize("words", ["--help", "demo --help", "doctor"])
def test_nothing_of_the_demo_is_imported_unless_it_runs(words):
    code = f"import sys, topd.cli.main as command\ntry: command.main({words.split()})\nfinally: print(sorted(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    loaded = out.splitlines()[-1]
    assert "'topd.cli.demo'" in loaded
    assert "'topd_demo" not in loaded
    assert "'rich'" not in loaded


def test_peak_memory_is_that_of_the_block():
    import torch

    with memory.peak_mib(torch.device("cpu")) as peak:
        torch.ones(16 * memory.MIB)  # 64 MiB
        peak_read = peak()
    if peak_read is None:
        pytest.skip("this system does not say")
    assert 60 < peak_read < 110
