"""The launches that `python -m bench.gpu` times one by one, and `--tune`."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from gpu_bench import CASE, CPU, INTERPRETED

from bench.gpu import kernels, tune
from bench.gpu.clock import DeviceClock
from topd_kernels.shared.launch import run_all


def ops() -> dict[str, kernels.Op]:
    tiles = kernels.tile_ops(2, 700, 3, CPU, torch.bfloat16)
    weighted = kernels.weighted_ops(CASE, 3, CPU, torch.bfloat16)
    return {op.name.split(" [")[0]: op for op in (*tiles, *weighted)}


@INTERPRETED
def test_every_op_is_right_on_what_is_timed():
    scores = kernels.score_ops(CASE, CPU, torch.float32)
    for op in (*ops().values(), kernels.transport_op(2, 4, 8, CPU), *scores):
        run_all(op.launches)
        assert op.error() < kernels.LIMIT, op.name


@dataclass
class Launch:
    """A stand-in: launches that write nothing."""

    num_warps: int = 4
    moved_bytes: int = 0
    constants: dict[str, Any] = field(default_factory=lambda: {"BLOCK": 1})

    @property
    def name(self) -> str:
        return "sweep"

    def run(self) -> None:
        if self.num_warps == 8:
            raise RuntimeError("out of resource: shared memory")


def rows_of(launch: Launch, error: float) -> list[kernels.KernelRow]:
    op = kernels.Op("op", [launch], lambda: error)
    return list(kernels.kernel_rows(op, DeviceClock(CPU), 3, 1e12))


def test_bytes_are_those_that_the_launch_declares():
    (row,) = rows_of(Launch(moved_bytes=3 << 20, constants={"BLOCK": 1, "GRAD": True}), 0.0)
    assert row.moved_bytes == 3 << 20
    assert row.kernel == "sweep, gradient"
    assert row.share_of_copy == pytest.approx((3 << 20) / row.time_ms.median * 1e3 / 1e12)
    assert row.cells()[3] == "3.0"
    assert not row.failed


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
