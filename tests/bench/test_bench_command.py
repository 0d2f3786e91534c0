"""`topd bench` from its words to its tables and files, and its refusals."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from topd.cli.main import main
from topd_bench.cases import CASES as SHAPES
from topd_bench.catalogue import CASES
from topd_bench.plans import Options, requests_of

ROOT = Path(__file__).parents[2]
TINY = ("bench", "--case", "divergence", "--shape", "tiny", "--loss", "reverse_kl", "--malloc", "default", "--rounds", "2")


def test_the_command_prints_a_table_and_writes_json_and_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    files = {"--json": tmp_path / "out.json", "--plot": tmp_path / "out.png"}
    words = [*TINY, "--peers", "ours", "eager", *(str(word) for pair in files.items() for word in pair)]
    run = subprocess.run([sys.executable, "-m", "topd.cli.main", *words], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert "### divergence, tiny: H 48 (teacher 64), float32, malloc default\n" in run.stdout
    rows = [line.split("|")[1:6] for line in run.stdout.splitlines() if "| reverse_kl" in line]
    peers = ["floor", "warm_floor", "topd", "eager"]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["64", "1,003", "reverse_kl", head, peer] for head in ("trainable", "frozen") for peer in peers
    ]
    assert "round 2/2" in run.stderr
    report = json.loads(files["--json"].read_text())
    assert report["complete"]
    assert [row["status"] for row in report["rows"]] == ["measured"] * 8
    assert all(row["shape"]["vocab"] == 1003 and row["gemm_flop"] > row["least_bytes"] for row in report["rows"])
    assert report["machine"]["threads"] > 0
    assert files["--plot"].read_bytes().startswith(b"\x89PNG")


def test_memory_grows_by_processes_of_their_own(tmp_path, capfd):
    words = ["--case", "memory", "--shape", "tiny", "--tokens", "64", "128", "--head", "frozen", "--peers", "ours", "--json"]
    assert main(["bench", *words, str(tmp_path / "out.json")]) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [(row["peer"], row["shape"]["n"], row["status"]) for row in rows] == [
        ("ours", 64, "measured"),
        ("ours", 128, "measured"),
    ]
    assert all(row["beyond_mib"] == row["peak_mib"] - row["gradients_mib"] <= row["budget_mib"] for row in rows)
    assert "| topd | frozen | 64 " in capfd.readouterr().out


def test_the_same_cases_run_under_pytest_benchmark(tmp_path):
    pytest.importorskip("pytest_benchmark")
    chosen = ("-k", "reverse_kl-frozen and (floor or ours or cce)", "--shape", "tiny", "--timed-rounds", "2")
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--benchmark-json={tmp_path / 'out.json'}")
    command = [sys.executable, "-m", "pytest", "bench/test_losses.py", *chosen, *options]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # else a worker of xdist's
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=alone)
    assert run.returncode == 0, run.stdout
    assert "2 passed, 1 skipped" in run.stdout
    results = {each["params"]["peer"]: each for each in json.loads((tmp_path / "out.json").read_text())["benchmarks"]}
    assert {peer: each["stats"]["rounds"] for peer, each in results.items()} == {"floor": 2, "ours": 2}
    assert results["ours"]["extra_info"]["value error"] < 1e-5


@pytest.mark.parametrize(
    ("case", "settings"),
    [
        ("numerics", {"rows": 2, "vocab": 50}),
        ("guidance", {"windows": 1, "window": 2}),
        ("transport", {"windows": 2, "window": 4, "width": 8}),
    ],
)
def test_the_cases_with_sizes_of_their_own_end_to_end(case, settings, capfd):
    pairs = [f"{name}={value}" for name, value in settings.items()]
    rounds = ["--rounds", "1"] if CASES[case].rounds else []
    assert main(["bench", "--case", case, "--peers", "ours", *rounds, "--set", *pairs]) == 0
    table = [line for line in capfd.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(table) == {"numerics": 2 + 2 * 4, "guidance": 2 + 2, "transport": 2 + 1}[case]


@pytest.mark.parametrize("case", ["windows", "step", "pairs"])
def test_a_model_that_is_not_installed_is_a_row_that_says_how_to_get_it(case, monkeypatch):
    import importlib

    from topd_bench.request import Request
    from topd_demo import smollm2

    monkeypatch.setattr(smollm2, "missing", lambda: "gguf not installed: pip install gguf")
    (record,) = importlib.import_module(f"topd_bench.{case}").work(Request(case, settings=dict(CASES[case].settings)))
    assert record["cells"][-1] == "gguf not installed: pip install gguf"
    assert len(record["cells"]) == len(record["header"])
    assert record["failed"]


@pytest.mark.parametrize(
    ("words", "refusal"),
    [
        ("--case speed", "invalid choice: 'speed'"),
        ("--case divergence --shape big", "--shape must be of tiny, smollm2_4"),
        ("--case divergence --peers unsloth", "--peers must be of all, ours, eager, torch.compile, trl, liger, cce"),
        ("--case divergence --loss logprobs_1", "--loss must be of reverse_kl, forward_kl, jsd with --case divergence"),
        ("--case transport --loss jsd", "--loss must be left out, since --case transport has none"),
        ("--case windows --shape tiny", "--shape must be left out with --case windows, whose sizes are --set windows=32"),
        ("--case windows --set tokens", "must be NAME=NUMBER, such as tokens=256, got 'tokens'"),
        ("--case windows --set token=5", "--set must be of windows, horizon, tokens with --case windows, got token"),
        ("--case divergence --hidden 64", "--hidden and --vocab must both be given for a shape of your own, got --hidden"),
        ("--case divergence --shape tiny --vocab 9", "--vocab must not stand beside --shape"),
        ("--case numerics --rounds 3", "--rounds must be left out with --case numerics, which times nothing"),
        ("--case profile --dtype bfloat16", "--dtype must be left out with --case profile"),
        ("--case divergence --points 5", "--points must stand beside --sweep"),
        ("--case transport --sweep tokens", "the cases with sizes to sweep are divergence, logprobs, memory"),
        ("--case memory --sweep tokens --tokens 5", "--tokens must be left out with --sweep tokens: --points has the sizes"),
        ("--case memory --sweep vocab --shape tiny qwen", "--shape must be one name with --sweep, got tiny, qwen"),
        ("--case step --plot a.png", "--plot must be left out with --case step: the cases with a picture are divergence"),
        ("--case memory --plot a.gif", "--plot must end in .png, .svg, .pdf, got 'a.gif'"),
        ("--case memory --plot /no/such/a.png", "--plot must be in a folder that is there, and /no/such is none"),
        ("--case memory --json /no/such/a.json", "--json must be in a folder that is there, and /no/such is none"),
    ],
)
def test_words_that_do_not_go_together_are_refused_with_what_to_do(words, refusal, capsys):
    try:
        status = main(["bench", *words.split()])
    except SystemExit as stop:
        status = stop.code
    assert status in (1, 2)
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("topd bench: ")
    assert refusal in line


def test_the_help_says_what_each_case_measures(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    text = capsys.readouterr().out
    for name, case in CASES.items():
        assert f"  {name:<12}{case.measures}\n" in text
        assert f"({case.takes}" in text


def test_jobs_are_what_was_asked_for():
    jobs = requests_of(Options("divergence"))
    assert len(jobs) == 2 * 2 * 3 * 2  # allocators, shapes, losses, heads
    assert {job.rounds for job in jobs} == {5}
    own = requests_of(Options("logprobs", tokens=(8, 16), hidden=4, vocab=9, heads=["frozen"], malloc="tuned"))
    assert [(job.sizes.n, job.sizes.vocab, job.sizes.student_width, job.loss) for job in own] == [
        (n, 9, 4, loss) for n in (8, 16) for loss in ("logprobs_1", "logprobs_50")
    ]
    memory = requests_of(Options("memory", peers=["ours", "trl"]))
    assert [(job.peers, job.sizes.n, job.head) for job in memory[:3]] == [
        (("ours",), 1024, "trainable"),
        (("trl",), 1024, "trainable"),
        (("ours",), 1024, "frozen"),
    ]
    sweep = requests_of(Options("divergence", sweep="vocab"))
    assert [(job.sizes.vocab, job.sizes.n) for job in sweep] == [(32_768 << k, SHAPES["smollm2"].n) for k in range(4)]
    assert {(job.loss, job.head, job.malloc, job.rounds) for job in sweep} == {("reverse_kl", "trainable", "default", 3)}
    tokens = requests_of(Options("divergence", sweep="tokens"))
    assert not any(job.warm_floor for job in tokens)
    assert [job.sizes.n for job in tokens] == [256 << k for k in range(7)]


def test_a_request_reaches_its_process_as_it_is():
    for case in CASES:
        for job in requests_of(Options(case)):
            assert type(job).read(job.without("eager", "why").text()) == job.without("eager", "why")
