"""The launches that `python -m topd_bench.gpu` times one by one, and `--tune`."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from gpu_bench import CASE, CPU, INTERPRETED

from topd_bench.cases import Case
from topd_bench.gpu import floors, kernels, tune
from topd_bench.gpu.clock import DeviceClock
from topd_bench.gpu.floors import Rates
from topd_bench.timing import Spread
from topd_kernels.shared.launch import run_all


def ops() -> dict[str, kernels.Op]:
    tiles = kernels.tile_ops(2, 700, 3, CPU, torch.bfloat16)
    weighted = kernels.weighted_ops(CASE, 3, CPU, torch.bfloat16)
    return {op.name.split(" [")[0]: op for op in (*tiles, *weighted)}


@INTERPRETED
def test_every_op_is_right_on_what_is_timed():
    for op in (*ops().values(), kernels.transport_op(2, 4, 8, CPU)):
        run_all(op.launches)
        assert op.error() < kernels.LIMIT, op.name


@dataclass
class Launch:
    """A stand-in: launches that write nothing."""

    num_warps: int = 4
    moved_bytes: int = 0
    constants: dict[str, Any] = field(default_factory=lambda: {"BLOCK": 1, "SCORES": False, "KIND": 0})
    arguments: dict[str, Any] = field(default_factory=lambda: {"Student": torch.empty(0)})

    @property
    def name(self) -> str:
        return "sweep"

    def run(self) -> None:
        if self.num_warps == 8:
            raise RuntimeError("out of resource: shared memory")


def rows_of(launch: Launch, error: float) -> list[kernels.KernelRow]:
    op = kernels.Op("op", [launch], lambda: error)
    return list(kernels.kernel_rows(op, DeviceClock(CPU), 3, Rates(1e12)))


def test_bytes_are_those_that_the_launch_declares():
    (row,) = rows_of(Launch(moved_bytes=3 << 20, constants={"BLOCK": 1, "GRAD": True}), 0.0)
    assert row.moved_bytes == 3 << 20
    assert row.kernel == "sweep, gradient"
    assert row.byte_ms == pytest.approx((3 << 20) / 1e12 * 1e3)
    assert row.issue_ms is None  # no count: a dash
    assert row.over_floor == pytest.approx(row.time_ms.median / row.byte_ms)
    assert row.cells()[3:7] == ["3.0", row.cells()[4], "0.003", "-"]
    assert not row.failed


def test_instructions_take_their_time_at_the_rate_of_issue(monkeypatch):
    """40 instructions an entry, 1,000 rows of 32,000 entries, 132 multiprocessors that issue 4 of 32 lanes at 1 GHz."""
    launch = Launch()
    launch.grid, launch.arguments = (1000, 2), {"vocab": 32_000}
    monkeypatch.setattr(floors, "instructions_of", lambda launch, family: 40.0 if family == "sm_90" else None)
    issued = 132 * 4 * 1e9
    assert Rates(None, issued, "sm_90").issue_ms(launch) == pytest.approx(40 * 32e6 / 32 / issued * 1e3)
    assert Rates(None, issued, "sm_75").issue_ms(launch) is None
    assert Rates(None).issue_ms(launch) is None
    row = kernels.KernelRow("op", "sweep", Spread(3.0, 3.0, 3.0), 10, 1.0, 2.0)
    assert row.over_floor == 1.5


def test_a_binary_that_cannot_be_counted_has_no_count():
    assert floors.instructions_of(Launch(), "sm_90") is None
    assert floors.instructions_of(Launch(), "sm_75") is None


def test_distinct_ids_follow_zipf():
    ids = kernels.distinct_zipf_ids(600, 5000, 20, CPU)
    assert ids.shape == (600, 20)
    assert all(row.unique().numel() == 20 for row in ids)
    counts = torch.bincount(ids.flatten(), minlength=5000)
    assert counts[0] > 500
    assert counts[0] > 4 * counts[20] > 4 * counts[500]


def test_what_is_timed_has_ids_by_zipf():
    """One token in nearly all rows: a sum that goes over its entries one by one is seen."""
    case = Case("ids", n=300, vocab=2000, student_width=4, teacher_width=4)
    (gather, scatter), rows = (
        kernels.weighted_ops(case, 20, CPU, torch.float32),
        kernels.tile_ops(300, 2000, 20, CPU, torch.float32),
    )
    asked = [gather.launches[0].arguments["Ids"], scatter.launches[0].arguments["Sorted"]]
    asked += [launch.arguments["Ids"] for op in rows for launch in op.launches if "Ids" in launch.arguments]
    assert len(asked) > 2
    for ids in asked:
        assert (ids == 0).sum() > 250


@pytest.mark.parametrize("error", [1.0, float("nan")])
def test_a_wrong_kernel_is_not_timed(error):
    (row,) = rows_of(Launch(), error)
    assert row.failed
    assert row.cells()[2] == "-"
    assert row.note.startswith("wrong: off by")


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
    launch = next(each for each in ops()[op].launches if each.name == kernel)
    other = tune.retiled(launch, 256, 8)
    assert tune.setting(other) == "BLOCK=256 warps=8"
    results = []
    for each in (launch, other):
        each.arguments[output].zero_()
        each.run()
        results.append(each.arguments[output].clone())
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    assert launch.constants["BLOCK"] != 256


def test_only_the_kernels_worth_it_are_tuned():
    tuned = {launch.name for op in ops().values() for launch in op.launches if tune.alternatives(launch)}
    assert tuned == {"statistics", "sweep", "rest", "gradient", "gather", "scatter"}


def test_a_tile_that_does_not_compile_is_counted_and_left_out():
    row = tune.tune_launch("op", Launch(4), [Launch(8), Launch(2)], DeviceClock(CPU), 3)
    assert (row.tried, row.failed, row.default) == (2, 1, "BLOCK=1 warps=4")
    assert row.best in ("BLOCK=1 warps=4", "BLOCK=1 warps=2")
    assert set(row.tried_ms) == {"BLOCK=1 warps=4", "BLOCK=1 warps=2"}


@INTERPRETED
def test_names_in_a_file_are_those_that_the_launchers_ask_for():
    keys = {(name, launch.name): tune.key_of(launch) for name, op in ops().items() for launch in op.launches}
    assert {keys["divergence_rows reverse_kl", name] for name in ("statistics", "sweep")} == {"statistics 4", "sweep 4"}
    assert keys["divergence_rows jsd", "sweep"] == "sweep 4"
    assert [keys["logprob_rows M = 3", name] for name in ("rest", "gradient")] == ["rest 4", "gradient 4"]
    assert keys["weighted_gather", "gather"] == "gather 2"
    assert keys["weighted_scatter", "scatter"] == "scatter 2"
    assert keys["logprob_rows M = 3", "chosen"] == ""


def tuned(key: str, default_ms: float, **tried_ms: float) -> tune.TuneRow:
    spread = Spread(default_ms, default_ms, default_ms)
    tried = {f"BLOCK={name[1:]} warps=4": time for name, time in tried_ms.items()}
    return tune.TuneRow("op", "kernel", "BLOCK=512 warps=4", spread, "", spread, len(tried), 0, key, tried)


def test_the_best_sizes_are_those_of_all_launches_of_a_name():
    rows = [
        tuned("sweep 4", 10.0, b512=10.0, b1024=4.0, b2048=6.0, b4096=1.0),
        tuned("sweep 4", 10.0, b512=10.0, b1024=9.0, b2048=6.0),  # 4,096 did not run
        tuned("gather 2", 1.0, b512=1.0, b1024=0.99),  # within what a timing is off by
        tuned("", 1.0, b512=1.0, b1024=0.1),
    ]
    assert tune.best_sizes(rows) == {"sweep 4": (2048, 4)}
