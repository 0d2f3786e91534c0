"""The lines of `python -m topd_bench.gpu`: shapes, contenders, and that what is wrong is not timed. The clock: wall time."""

import importlib.util
from dataclasses import replace

import pytest
import torch
from gpu_bench import CASE, CPU, INTERPRETED

from topd_bench.agreement import Errors, is_wrong
from topd_bench.cases import GPU_CASES, make_inputs
from topd_bench.gpu import lines, times
from topd_bench.gpu.clock import Budget, DeviceClock, FreshClock
from topd_bench.peers.peer import UNKNOWN


def test_shapes_are_the_models():
    shapes = {name: (case.n, case.student_width, case.teacher_width, case.vocab) for name, case in GPU_CASES.items()}
    assert shapes == {
        "qwen3-8b from qwen3-14b": (8192, 4096, 5120, 151936),
        "qwen3-4b from qwen3-30b-a3b": (8192, 2560, 2048, 151936),
        "llama-3.2-1b from llama-3.1-8b": (8192, 2048, 4096, 128256),
        "gemma-3-4b from gemma-3-27b": (8192, 2560, 5376, 262208),
    }


def test_tokens_are_halved_where_memory_is_short():
    case = GPU_CASES["qwen3-4b from qwen3-30b-a3b"]
    assert lines.fitted(case, 80 << 30, 2) == (case, "")
    smaller, text = lines.fitted(case, 13 << 29, 2)
    assert smaller == replace(case, n=4096)
    assert text == "qwen3-4b from qwen3-30b-a3b: N reduced from 8192 to 4096: 6.5 GiB free, N = 8192 needs 6.8 GiB"


def fake_line(error: float = 0.5, **runs) -> lines.Line:
    limits = Errors(0.75)
    return lines.Line("shape", 4, "frozen", "jsd", runs, 3e12, lambda result: Errors(error), limits, {"liger": "skipped: why"})


def test_a_line_divides_by_floor_and_ours_and_tells_what_failed():
    def broken():
        raise ValueError("no such option\nand more")

    def full():
        raise torch.OutOfMemoryError("CUDA out of memory")

    small = torch.ones(300, 300)
    line = fake_line(floor=lambda: small @ small, ours=lambda: small + 1, trl=broken, eager=full)
    rows = {row.contender: row for row in times.measure(line, DeviceClock(CPU), 5, 10.0)}
    assert rows["trl"].note == "failed: ValueError: no such option"
    assert rows["eager"].note == "out of memory"
    assert rows["liger"].note == "skipped: why"
    assert rows["floor"].over_floor is None
    assert rows["floor"].over_ours.median > 0
    assert rows["ours"].over_floor.median == pytest.approx(1 / rows["floor"].over_ours.median)
    assert rows["ours"].value_error == 0.5
    assert rows["trl"].time_ms is None
    assert [name for name, row in rows.items() if row.failed] == []


class Untouched(DeviceClock):
    """A clock that must not be asked."""

    def sample(self, run):
        raise AssertionError("timed")


class Emptied(DeviceClock):
    """A clock that notes when it empties torch's cache."""

    def __init__(self, events: list[str]) -> None:
        super().__init__(CPU)
        self.events = events

    def release(self) -> None:
        self.events.append("emptied")


def test_caches_are_emptied_between_contenders():
    """Each contender runs twice before its result is judged: it compiles, then its peak is measured."""
    events: list[str] = []
    runs = {name: lambda name=name: events.append(name) for name in ("floor", "ours", "eager")}
    times.check(fake_line(**runs), Emptied(events))
    assert events == [event for name in runs for event in (name, name, "emptied")]


@pytest.mark.parametrize("error", [1.0, float("nan")])
def test_nothing_is_timed_where_topd_is_wrong(error):
    line = fake_line(error, floor=lambda: None, ours=lambda: None, eager=lambda: None)
    rows = {row.contender: row for row in times.measure(line, Untouched(CPU), 5, 10.0)}
    assert rows["ours"].note == "wrong: nothing in this line is timed"
    assert [name for name, row in rows.items() if row.failed] == ["ours"]
    assert all(row.time_ms is None for row in rows.values())


def test_others_are_timed_whatever_their_digits():
    line = fake_line(ours=lambda: 0, eager=lambda: 1)._replace(errors=lambda result: Errors(float(result)))
    rows = {row.contender: row for row in times.measure(line, DeviceClock(CPU), 3, 1.0)}
    assert rows["eager"].time_ms is not None
    assert rows["eager"].value_error == 1.0


@INTERPRETED
@pytest.mark.parametrize("head", ["trainable", "frozen"])
@pytest.mark.parametrize("loss", ["reverse_kl", "logprobs_50"])
def test_a_real_line_is_right(loss, head, monkeypatch):
    libraries, installed = ("trl", "liger_kernel"), importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in libraries else installed(name))
    inputs = make_inputs(CASE, trainable_head=True, device=CPU, dtype=torch.bfloat16)
    line = lines.loss_line(CASE, inputs, head, loss, compiled=False)
    assert set(line.runs) == {"floor", "ours", "eager"}
    assert line.skipped == {
        "torch.compile": "skipped: no time left to compile",
        "cce": "skipped: needs a GPU" if loss == "logprobs_1" else f"skipped: {UNKNOWN}",
        "trl": f"skipped: {'not installed: pip install trl' if loss == 'reverse_kl' else UNKNOWN}",
        "liger": f"skipped: {'not installed: pip install liger-kernel' if loss == 'reverse_kl' else UNKNOWN}",
    }
    products = 2 * 2 * 40 * ((3 if head == "trainable" else 2) * 8 + (6 if loss == "reverse_kl" else 0))
    assert line.flop == products
    ours = line.runs["ours"]()
    errors = line.errors(ours)
    assert errors.value < 1e-5
    assert errors.hidden < 4 * 2**-8
    assert (errors.weight is None) == (head == "frozen")
    assert not is_wrong(errors, line.limits)
    assert is_wrong(line.errors(ours._replace(value=ours.value * 1.01)), line.limits)
    assert is_wrong(line.errors(ours._replace(hidden=ours.hidden * 1.1)), line.limits)
    assert line.errors(line.runs["floor"]()) is None


@INTERPRETED
def test_topd_alone_is_beside_the_floor_at_two_workspaces():
    inputs = make_inputs(CASE, trainable_head=True, device=CPU, dtype=torch.bfloat16)
    line = lines.own_line(CASE, inputs, "trainable", "jsd")
    assert list(line.runs) == ["floor", "ours", "ours, 512 MiB"]
    assert line.skipped == {}
    for name in ("ours", "ours, 512 MiB"):
        assert not is_wrong(line.errors(line.runs[name]()), line.limits)


@INTERPRETED
def test_scores_are_right():
    inputs = make_inputs(CASE, trainable_head=False, device=CPU, dtype=torch.float32)
    line = lines.score_line(CASE, inputs)
    assert list(line.runs) == ["floor", "ours", "eager"]
    for name in list(line.runs)[1:]:
        assert line.errors(line.runs[name]()).value < 1e-4
    assert line.errors(line.runs["floor"]()) is None


def test_transport_is_right():
    line = lines.transport_line(CPU, 2, 4, 8)
    assert set(line.runs) - {"ot.batch", "ot.batch matched"} == {"ours"}
    assert not is_wrong(line.errors(line.runs["ours"]()), line.limits)


def test_each_sample_of_what_allocates_follows_a_call_that_is_not_timed():
    calls = []
    sample = FreshClock(CPU).sample(lambda: calls.append(len(calls)))
    assert calls == [0, 1]
    assert sample.time_ms >= 0


def test_lines_without_time_are_named_and_make_no_inputs(monkeypatch):
    budget = Budget(0.0, 2)
    monkeypatch.setattr(times, "make_inputs", None)
    wanted = [times.Wanted("jsd", "frozen", None), times.Wanted("score_tokens", "-", None)]
    rows = list(times.all_rows([(CASE, wanted)], DeviceClock(CPU), budget, 1, torch.bfloat16))
    assert [(row.loss, row.note) for row in rows] == [
        ("jsd", "skipped: the time is used up"),
        ("score_tokens", "skipped: the time is used up"),
    ]
