"""python -m bench.gpu, as far as a machine without a GPU can tell: its checks run in Triton's interpreter and notice errors,
its tables and its JSON hold what was measured, and it says clearly that there is no GPU."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from bench import gpu, gpu_checks, gpu_judge, gpu_kernels, gpu_peers, gpu_problems, gpu_repeats, gpu_times, gpu_tune
from bench.cases import GPU_CASES, Case
from bench.gpu_clock import Budget, Clock
from bench.gpu_judge import Check, Evidence, Part, judge
from bench.measure import Spread
from topd_kernels import register

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SIZES = replace(gpu_problems.TINY, rows=2, problems=1)
INTERPRETED = pytest.mark.skipif(not register.interpreted(), reason="CPU tensors need TRITON_INTERPRET=1")
CASE = Case("small", n=2, vocab=40, student_width=8, teacher_width=6)


@pytest.fixture(scope="module")
def found() -> list[Evidence]:
    """Every check but those that only the number of options multiplies."""
    return list(gpu_checks.evidence(SIZES, CPU, quick=True))


# Checks


@INTERPRETED
def test_every_check_holds_in_the_interpreter(found):
    assert [check.cells() for check in map(judge, found) if not check.ok] == []


@INTERPRETED
def test_every_op_is_checked(found):
    names = "\n".join(evidence.name for evidence in found)
    for op in ("linear_divergence", "linear_logprobs", "score_tokens", "near_future_divergence"):
        assert op in names
        assert f"{op} again" in names
    for name in ("weighted_gather", "weighted_scatter", "of 1e-7", "everything", "bfloat16", "float16", *gpu_checks.COSTS):
        assert name in names
    assert len({evidence.name for evidence in found}) == len(found)


@INTERPRETED
def test_gradients_and_scores_are_parts(found):
    parts = {name: set(evidence.parts) for evidence in found for name in [evidence.name]}
    everything = parts["linear_divergence reverse_kl float32, everything"]
    assert everything >= {"value", "d hidden", "d weight", "d bias", "reverse_kl", "teacher_lost_mass", "top1_agreement"}
    assert parts["linear_logprobs M = 3, entropy bfloat16"] == {"logprobs", "entropy", "d hidden", "d weight"}


@INTERPRETED
def test_an_error_anywhere_fails_the_check(found):
    """Each part of each check in turn, one entry moved by three times what is allowed, or made NaN."""
    for evidence in found:
        for name, part in evidence.parts.items():
            scale = part.truth.double().abs().max().item() if part.scale is None else part.scale
            for error in (3 * part.bound * scale + 1e-3 * (part.bound * scale == 0) + part.error * scale, math.nan):
                wrong = part.found.double().clone()
                wrong.view(-1)[-1] = part.truth.double().reshape(-1)[-1] + error
                planted = evidence._replace(parts={**evidence.parts, name: part._replace(found=wrong)})
                assert not judge(planted).ok, (evidence.name, name)
                assert judge(planted).part == name


@INTERPRETED
@pytest.mark.parametrize(
    ("op", "check"),
    [
        ("divergence_rows", lambda: gpu_checks.check_divergences(SIZES, CPU, quick=True)),
        ("divergence_rows", lambda: gpu_checks.check_near_equal(SIZES, CPU)),
        ("logprob_rows", lambda: gpu_checks.check_logprobs(SIZES, CPU, quick=True)),
        ("weighted_gather", lambda: gpu_checks.check_weighted(SIZES, CPU)),
        ("transport", lambda: gpu_checks.check_transport(SIZES, CPU, quick=True)),
        ("score_tokens", lambda: gpu_checks.check_scores(SIZES, CPU, quick=True)),
    ],
)
def test_a_wrong_kernel_fails_the_check(op, check, monkeypatch):
    right = register.LAUNCHERS[op]

    def wrong(*arguments):
        made = right(*arguments)
        (arguments if made is None else made)[0].mul_(1.001)  # the first result or row of it, or what was added to
        return made

    assert judge(next(check())).ok
    monkeypatch.setitem(register.LAUNCHERS, op, wrong)
    assert not judge(next(check())).ok


def test_the_bound_is_eagers_error_and_a_constant():
    truth = {"value": torch.tensor([1.0, -2.0]), "d hidden": torch.tensor([4.0])}
    eager = {"value": torch.tensor([1.5, -2.0]), "d hidden": torch.tensor([4.0])}
    parts = gpu_judge.no_worse(eager, eager, truth, torch.bfloat16)
    assert parts["value"].bound == pytest.approx(0.25 + gpu_judge.FLOAT32_CONSTANT)
    assert parts["d hidden"].bound == 4 * 2**-8


def test_judging_extremes():
    one, nan = torch.ones(2), torch.tensor([1.0, math.nan])
    assert judge(Evidence("equal", {"a": Part(one, one, 0.0)})).ok
    assert judge(Evidence("infinite on both sides", {"a": Part(one / 0, one / 0, 0.0, 1.0)})).ok
    assert not judge(Evidence("NaN", {"a": Part(one, one, 1.0), "b": Part(nan, one, 1e9)})).ok
    assert not judge(Evidence("shape", {"a": Part(one[:1], one, 1.0)})).ok
    assert not judge(Evidence("beside zero", {"a": Part(one * 1e-9, one * 0, 1.0)})).ok
    assert judge(Evidence("nothing", {"a": Part(one[:0], one[:0], 0.0)})).ok


def test_a_run_that_differs_is_noticed():
    one, other = {"x": torch.tensor([1.0, math.nan])}, {"x": torch.tensor([1.0, 2.0])}
    assert judge(gpu_repeats.again("same", iter([one, dict(one)]).__next__)).ok
    assert not judge(gpu_repeats.again("other", iter([one, other]).__next__)).ok


@pytest.mark.parametrize("specialised", [False, True])
def test_variants_are_counted(specialised, monkeypatch):
    """A device's cache of a kernel is a tuple that begins with a dict of binaries."""

    kernel, unused = (SimpleNamespace(device_caches=defaultdict(lambda: ({}, {}, None))) for _ in range(2))

    def run(rows: int) -> None:
        kernel.device_caches[0][0]["16" if specialised and rows % 16 == 0 else "any"] = "binary"

    kernel.device_caches[0][0]["from before"] = "binary"
    monkeypatch.setattr(gpu_repeats, "kernels", lambda: {"kernel": kernel, "unused": unused})
    (evidence,) = gpu_repeats.variants(run, (3, 5, 16))
    check = judge(evidence)
    assert check.ok != specialised
    assert check.error == float(specialised)


def test_kernels_of_triton_have_the_cache_that_is_counted():
    """In a process of its own: without the interpreter."""
    code = (
        "from bench.gpu_repeats import compiled, kernels\n"
        "print(*sorted(kernels()), sum(map(compiled, kernels().values())))\n"
        "kernel = kernels()['divergence_rows.sweep']\n"
        "kernel.device_caches[0] = ({'a': 1}, {}, None, None, None)\n"
        "print(compiled(kernel))\n"
    )
    output = run_python("-c", code).stdout.split()
    assert {"divergence_rows.sweep", "logprob_rows.rest", "row_statistics.statistics", "transport.transport"} <= set(output)
    assert output[-2:] == ["0", "1"]


# Without a GPU


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    hidden = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "PYTHONPATH": f"{ROOT / 'python_api'}:{ROOT}"}
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | hidden
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, env=environment)


def test_says_that_there_is_no_gpu(tmp_path):
    done = run_python("-m", "bench.gpu", "--json", str(tmp_path / "gpu.json"))
    assert done.returncode == 2
    assert done.stderr == (
        "no GPU: torch sees no CUDA or ROCm device on this machine; nothing was checked and nothing was timed\n"
    )
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


# Timings


def test_shapes_are_the_models():
    shapes = {name: (case.n, case.student_width, case.teacher_width, case.vocab) for name, case in GPU_CASES.items()}
    assert shapes == {
        "qwen3-4b from qwen3-30b-a3b": (8192, 2560, 2048, 151936),
        "llama-3.2-1b from llama-3.1-8b": (8192, 2048, 4096, 128256),
        "gemma-3-4b from gemma-3-27b": (8192, 2560, 5376, 262208),
    }


def test_tokens_are_halved_where_memory_is_short():
    case = GPU_CASES["qwen3-4b from qwen3-30b-a3b"]
    assert gpu_peers.fitted(case, 80 << 30, 2) == (case, "")
    found, text = gpu_peers.fitted(case, 13 << 29, 2)
    assert found == replace(case, n=4096)
    assert text == "qwen3-4b from qwen3-30b-a3b: N reduced from 8192 to 4096: 6.5 GiB free, N = 8192 needs 6.8 GiB"


def fake_line(**runs) -> gpu_times.Line:
    return gpu_times.Line("shape", 4, "frozen", "jsd", runs, 3e12, lambda result: (0.5, None), {"liger": "skipped: why"})


def test_a_line_divides_by_floor_and_ours_and_tells_what_failed():
    def broken():
        raise ValueError("no such option\nand more")

    def full():
        raise torch.OutOfMemoryError("CUDA out of memory")

    small = torch.ones(300, 300)
    line = fake_line(floor=lambda: small @ small, ours=lambda: small + 1, trl=broken, eager=full)
    rows = {row.contender: row for row in gpu_times.measure(line, Clock(CPU), 5, 10.0)}
    assert rows["trl"].note == "failed: ValueError: no such option"
    assert rows["eager"].note == "out of memory"
    assert rows["liger"].note == "skipped: why"
    assert rows["floor"].over_floor is None
    assert rows["floor"].over_ours.median > 0
    assert rows["ours"].over_floor.median == pytest.approx(1 / rows["floor"].over_ours.median)
    assert rows["ours"].value_error == 0.5
    assert rows["trl"].time_ms is None


def test_ours_is_judged_where_it_is_timed():
    good = gpu_times.TimeRow("s", 1, "h", "l", "ours", Spread(1.0, 1.0, 1.0), value_error=1e-5, hidden_error=1e-3)
    others = [replace(good, contender="eager", value_error=1.0), replace(good, hidden_error=0.1), replace(good, time_ms=None)]
    assert all(check.ok for check in gpu_times.verdict([good], torch.bfloat16))
    assert [check.ok for check in gpu_times.verdict(others, torch.bfloat16)] == [True, False, False, True, True]


@INTERPRETED
def test_a_real_line_is_right(monkeypatch):
    peers, installed = ("trl", "liger_kernel"), importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in peers else installed(name))
    inputs = gpu_peers.make_inputs(CASE, CPU, torch.bfloat16)
    line = gpu_times.loss_line(CASE, inputs, "trainable", "reverse_kl", compiled=False)
    assert set(line.runs) == {"floor", "ours", "eager"}
    assert set(line.skipped) == {"torch.compile"}
    assert line.flop == 2 * 2 * 40 * (3 * 8 + 6)
    value, hidden = line.errors(line.runs["ours"]())
    assert value < 1e-5
    assert hidden < 4 * 2**-8
    wrong = line.runs["ours"]()
    assert line.errors(wrong._replace(value=wrong.value * 1.01))[0] > gpu_times.VALUE_LIMIT
    assert line.errors(line.runs["floor"]()) == (None, None)


def test_losses_agree_with_float64_on_a_cpu():
    inputs = gpu_peers.make_inputs(CASE, CPU, torch.float32)
    rows = torch.arange(2)
    for loss in gpu_peers.LOSSES:
        chosen = gpu_peers.chosen_of(inputs, loss)
        sides = (inputs.student_hidden, inputs.student_weight, inputs.teacher_hidden, inputs.teacher_weight)
        value = gpu_peers.full_logits(loss, *sides, *chosen)
        torch.testing.assert_close(value.double(), gpu_peers.truth(inputs, loss, chosen, rows)[0], rtol=1e-4, atol=1e-6)


def test_lines_without_time_are_named(monkeypatch):
    plan = gpu_times.Plan((CASE,), ("jsd",), ("frozen",), 1, torch.bfloat16, None)
    monkeypatch.setattr(Budget, "share", lambda self: 0.0)
    rows = [row for rows in gpu_times.all_rows(plan, Clock(CPU), 0.0, lambda: 1 << 40) for row in rows]
    assert [(row.loss, row.note) for row in rows] == [
        ("jsd", "skipped: the time is used up"),
        ("score_tokens", "skipped: the time is used up"),
    ]
    assert plan.lines == 2


# Kernels


def ops() -> dict[str, gpu_kernels.Op]:
    made = [*gpu_kernels.tile_ops(2, 700, 3, CPU, torch.bfloat16), *gpu_kernels.weighted_ops(CASE, 3, CPU, torch.bfloat16)]
    return {op.name.split(" [")[0]: op for op in made}


def test_bytes_of_the_kernels():
    """What the launches declare: the tiles, and a row's few numbers."""
    sizes = {(name, gpu_kernels.label(x)): x.moved_bytes for name, op in ops().items() for x in op.launches}
    entries, few = 2 * 700, 500
    assert 0 < sizes["divergence_rows reverse_kl", "statistics"] - 8 * entries < few
    assert 0 < sizes["divergence_rows reverse_kl", "sweep, gradient"] - 10 * entries < few
    assert 0 < sizes["divergence_rows jsd", "sweep"] - 8 * entries < few
    assert 0 < sizes["divergence_rows jsd", "sweep, gradient"] - 10 * entries < few
    assert 0 < sizes["logprob_rows M = 3", "rest"] - 4 * entries < few
    assert 0 < sizes["logprob_rows M = 3", "gradient"] - 6 * entries < few
    assert sizes["weighted_gather", "gather"] == 2 * 3 * 8 * 2 + 2 * 2 * 8 * 4 + 2 * 3 * (8 + 4)
    assert sizes["divergence_rows jsd", "finish"] < entries


@INTERPRETED
@pytest.mark.parametrize(
    ("op", "kernel", "output"),
    [
        ("divergence_rows reverse_kl", "statistics", "Parts"),
        ("logprob_rows M = 3", "rest", "Parts"),
        ("weighted_gather", "gather", "Out"),
    ],
)
def test_other_block_sizes_do_the_same_work(op, kernel, output):
    launch = next(x for x in ops()[op].launches if x.name == kernel)
    other = gpu_tune.retiled(launch, 256, 8)
    assert gpu_tune.setting(other) == "BLOCK=256 warps=8"
    results = []
    for each in (launch, other):
        each.arguments[output].zero_()
        each.run()
        results.append(each.arguments[output].clone())
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    assert launch.constants["BLOCK"] != 256


def test_only_the_kernels_worth_it_are_tuned():
    tuned = {launch.name for op in ops().values() for launch in op.launches if gpu_tune.alternatives(launch)}
    assert tuned == {"statistics", "sweep", "rest", "gradient", "gather", "scatter"}


def test_a_tile_that_does_not_compile_is_counted_and_left_out():
    class Launch:
        constants, name = {"BLOCK": 1}, "sweep"

        def __init__(self, num_warps: int) -> None:
            self.num_warps = num_warps

        def run(self) -> None:
            if self.num_warps == 8:
                raise RuntimeError("out of resource: shared memory")

    row = gpu_tune.tune_launch("op", Launch(4), [Launch(8), Launch(2)], Clock(CPU), 3)
    assert (row.tried, row.failed, row.default) == (2, 1, "BLOCK=1 warps=4")
    assert row.best in ("BLOCK=1 warps=4", "BLOCK=1 warps=2")


# The report


def fill(report: gpu.Report, *, ok: bool = True) -> None:
    spread = Spread(2.0, 1.0, 3.0)
    report.checks.append(Check("linear_divergence jsd", "d hidden", 1e-6 if ok else math.nan, 5e-6))
    report.times.append(
        gpu_times.TimeRow("qwen", 8192, "frozen", "jsd", "trl", spread, spread, spread, 20.0, 123.4, 1e-4, 2e-3, "a note")
    )
    report.kernels.append(gpu_kernels.KernelRow("divergence_rows", "sweep", spread, 4_000_000_000, 0.6))
    report.tuned.append(gpu_tune.TuneRow("divergence_rows", "sweep", "BLOCK=1024", spread, "BLOCK=512", spread, 12, 1))
    report.copy_gbs = 3000.0


def test_tables_hold_what_was_measured():
    report = gpu.Report({"device": "a GPU", "HIP": None})
    fill(report)
    text = report.tables()
    words = (
        "1 of 1 checks hold",
        "| linear_divergence jsd | d hidden   | 1.0e-06 | 5.0e-06 | yes |",
        "2.00 (1.00-3.00)",
        "| 10000   | 123      | 1.0e-04     | 2.0e-03        | a note |",
        "a copy moves 3000 GB/s",
        "2.000 (1.000-3.000)",
        "| 2000 | 60%",
        "BLOCK=512",
        "12, 1 failed",
        "Bounds: u = half",
    )
    assert [word for word in words if word not in text] == []
    assert gpu.header_lines(report.machine) == "device: a GPU"


@pytest.mark.parametrize(
    ("ok", "error", "status"),
    [(True, None, 0), (False, None, 1), (True, RuntimeError("lost the device"), 1), (True, KeyboardInterrupt(), 130)],
)
def test_main_prints_writes_and_exits(ok, error, status, monkeypatch, tmp_path, capsys):
    def run(report, arguments, device):
        fill(report, ok=ok)
        if error is not None:
            raise error

    monkeypatch.setattr(gpu, "refusal", lambda: None)
    monkeypatch.setattr(gpu, "machine", lambda device: {"device": "a GPU"})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(gpu, "run", run)
    path = tmp_path / "gpu.json"
    assert gpu.main(["--json", str(path)]) == status
    printed = capsys.readouterr().out
    assert printed.startswith("device: a GPU\n")
    assert "### kernels" in printed
    written = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert written["complete"] == (error is None)
    assert written["failed"] == (not ok)
    assert written["checks"][0]["ok"] == ok
    assert written["times"][0]["time_ms"] == {"median": 2.0, "low": 1.0, "high": 3.0}
    assert written["kernels"][0]["moved_bytes"] == 4_000_000_000
    assert written["tuned"][0]["failed"] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_quick_is_one_shape():
    plan = gpu.plan_of(gpu.parser().parse_args(["--quick", "--n", "512"]))
    assert [(case.name, case.n) for case in plan.shapes] == [("qwen3-4b from qwen3-30b-a3b", 512)]
    assert plan.lines == 4
    whole = gpu.plan_of(gpu.parser().parse_args([]))
    assert whole.lines == 3 * (4 * 2 + 1) + 1


def test_first_lines_are_facts():
    facts = gpu.machine(CPU)
    assert {"device", "torch", "triton", "CUDA", "HIP", "commit"} <= set(facts)
    assert gpu.header_lines(facts).startswith("device: ")
