"""The rows of `topd bench --case divergence`, `logprobs` and `memory`: missing, failing and wrong peers."""

import importlib.util

import pytest
import torch

from topd_bench import loss_times, memory
from topd_bench.cases import CASES, Case
from topd_bench.limits import words_of
from topd_bench.peers import PEERS
from topd_bench.peers.peer import Peer
from topd_bench.request import Request

SHAPE = Case("small", n=5, vocab=40, student_width=8, teacher_width=6)
REQUEST = Request("divergence", SHAPE, "jsd", rounds=2, peers=("ours", "eager"), backend="eager")


@pytest.fixture(autouse=True)
def no_limit(monkeypatch):
    """A limit would stay with the process of all tests."""
    for module in (loss_times, memory):
        monkeypatch.setattr(module, "limit_memory", lambda limit_gib: 3.0)


def rows_of(request: Request) -> dict[str, dict]:
    records = [record for record in loss_times.work(request) if record["table"] == "rows"]
    assert all(record["header"] == list(loss_times.HEADER) for record in records)
    assert all(len(record["cells"]) == len(loss_times.HEADER) for record in records)
    return {record["row"]["peer"]: record["row"] | {"failed": record["failed"], "cells": record["cells"]} for record in records}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("loss", ["reverse_kl", "logprobs_50"])
def test_each_measured_peer_has_times_ratios_and_its_error_against_float64(loss, dtype):
    rows = rows_of(Request("divergence", SHAPE, loss, dtype=dtype, rounds=3, peers=("ours", "eager"), backend="eager"))
    assert list(rows) == ["floor", "warm_floor", "ours", "eager"]
    for name, row in rows.items():
        assert (row["status"], row["note"], row["failed"]) == ("measured", "", False)
        assert len(row["samples_ms"]) == 3
        assert set(row["ratios"]) == {"floor", "warm_floor", "ours"} - {name}
    for name in ("ours", "eager"):
        assert 0 <= rows[name]["value_error"] < (1e-2 if dtype == "bfloat16" else 1e-5)
        assert rows[name]["weight_error"] is not None
    eager = [row["samples_ms"] for row in (rows["eager"], rows["ours"])]
    ratios = sorted(above / below for above, below in zip(*eager, strict=True))
    assert rows["eager"]["ratios"]["ours"] == {"median": ratios[1], "low": ratios[0], "high": ratios[2]}
    assert rows["ours"]["cells"][:5] == ["5", "40", loss, "trainable", "topd"]


def test_a_missing_library_is_a_row_with_the_line_that_installs_it(monkeypatch):
    installed = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("trl", "liger_kernel") else installed(name))
    rows = rows_of(Request("divergence", SHAPE, "jsd", rounds=1, peers=("ours", "trl", "liger", "cce"), backend="eager"))
    assert {name: rows[name]["note"] for name in ("trl", "liger", "cce")} == {
        "trl": "not installed: pip install trl",
        "liger": "not installed: pip install liger-kernel",
        "cce": "it does not know this loss",
    }
    assert all(rows[name]["status"] == "skipped" and rows[name]["time_ms"] is None for name in ("trl", "liger", "cce"))
    assert rows["ours"]["time_ms"] is not None


def wrong(workload, backend):
    def run():
        result = PEERS["eager"].contender(workload, backend)()
        return result._replace(value=result.value * 1.01)

    return run


def failing(workload, backend):
    def run():
        raise ValueError("no such option\nand more")

    return run


def test_a_wrong_peer_has_no_time_and_the_others_have(monkeypatch):
    monkeypatch.setitem(PEERS, "trl", Peer(wrong))
    rows = rows_of(Request("divergence", SHAPE, "jsd", rounds=1, peers=("ours", "eager", "trl"), backend="eager"))
    assert rows["trl"]["note"] == "wrong: off by more than 0.001, not timed"
    assert rows["trl"]["value_error"] == pytest.approx(0.01, rel=1e-3)
    assert (rows["trl"]["status"], rows["trl"]["time_ms"], rows["trl"]["failed"]) == ("wrong", None, False)
    assert rows["eager"]["time_ms"] is not None


@pytest.mark.parametrize("broken", [wrong, failing])
def test_topd_itself_may_not_be_wrong_or_fail(monkeypatch, broken):
    monkeypatch.setitem(PEERS, "ours", Peer(broken))
    rows = rows_of(REQUEST)
    assert rows["ours"]["failed"]
    assert rows["eager"]["time_ms"] is not None
    assert set(rows["eager"]["ratios"]) == {"floor", "warm_floor"}


def test_a_peer_that_fails_once_it_is_timed_is_a_row_and_the_rounds_go_on(monkeypatch):
    calls = []

    def contender(workload, backend):
        def run():
            calls.append(None)
            if len(calls) == 3:
                raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried")
            return PEERS["eager"].contender(workload, backend)()

        return run

    monkeypatch.setitem(PEERS, "trl", Peer(contender))
    rows = rows_of(Request("divergence", SHAPE, "jsd", rounds=4, peers=("ours", "trl"), backend="eager"))
    assert rows["trl"]["note"] == "out of memory: it may have 3.0 GiB"
    assert len(calls) == 3
    assert len(rows["ours"]["samples_ms"]) == 4


def test_a_sweep_does_without_the_buffers_of_the_warm_floor():
    request = Request("divergence", SHAPE, "jsd", rounds=1, peers=("ours",), backend="eager", warm_floor=False)
    assert list(rows_of(request)) == ["floor", "ours"]


def test_a_peer_that_is_too_slow_is_not_timed():
    rows = rows_of(Request("divergence", SHAPE, "jsd", rounds=1, peers=("ours", "eager"), backend="eager", limit_seconds=0.0))
    assert rows["eager"]["note"] == "a call takes 0 s, the limit is 0 s"
    assert rows["eager"]["time_ms"] is None


def test_an_interrupt_keeps_whole_rounds(monkeypatch):
    calls = []

    def contender(workload, backend):
        def run():
            calls.append(None)
            if len(calls) == 5:  # checked, warm, two rounds
                raise KeyboardInterrupt
            return PEERS["eager"].contender(workload, backend)()

        return run

    monkeypatch.setitem(PEERS, "trl", Peer(contender))
    request = Request("divergence", SHAPE, "jsd", rounds=9, peers=("ours", "trl"), backend="eager")
    records = loss_times.work(request)
    rows = {}
    while "trl" not in rows:
        record = next(records)
        if record["table"] == "rows":
            rows[record["row"]["peer"]] = record["row"]
    with pytest.raises(KeyboardInterrupt):
        next(records)
    assert {name: len(row["samples_ms"]) for name, row in rows.items()} == {"floor": 2, "warm_floor": 2, "ours": 2, "trl": 2}
    assert {row["note"] for row in rows.values()} == {"interrupted: 2 of 9 rounds"}


def test_words_of_errors():
    assert words_of(MemoryError(), 1.5) == "out of memory: it may have 1.5 GiB"
    assert words_of(torch.OutOfMemoryError("x"), None) == "out of memory"
    assert words_of(KeyError("x\ny"), None) == "failed: KeyError: 'x\\ny'"


def test_memory_of_a_peer_that_fails_is_a_row(monkeypatch):
    monkeypatch.setitem(PEERS, "eager", Peer(failing))
    *_, record = memory.work(Request("memory", CASES["tiny"], "jsd", peers=("eager",)))
    assert record["cells"][-1] == "failed: ValueError: no such option"
    assert record["cells"][5:8] == ["-", "-", "-"]
    assert not record["failed"]
