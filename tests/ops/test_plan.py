"""The chunk planner: a pure function of rows, widths, bytes and backend."""

from typing import Any

import pytest
import torch
from memory_watch import Largest

import topd
from topd.ops.shared.engines import TRITON
from topd.ops.shared.loop import plan_rows
from topd.ops.shared.plan import (
    GPU_BLOCK,
    MIB,
    ChunkPlan,
    Products,
    default_workspace,
    plan_chunks,
    wanted_workspace,
)

GIB, VOCAB, CUDA = 1024 * MIB, 151_936, torch.device("cuda:0")


def sizes(plan) -> list[int]:
    return [stop - start for start, stop in plan.bounds()]


def test_chunks_are_balanced():
    """512 rows where 441 fit are two of 256, not 441 and 71."""
    plan = plan_chunks(512, 100, 100, workspace_bytes=441 * 800)
    assert (plan.rows, plan.chunks, sizes(plan)) == (256, 2, [256, 256])
    assert plan.workspace_bytes == 256 * 800


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 99, 100, 101, 5000])
@pytest.mark.parametrize("n", [1, 2, 100, 101, 997])
def test_every_row_is_in_exactly_one_chunk_and_none_passes_the_limit(n, limit):
    """As few chunks as the limit allows, in order, of sizes that differ by at most one."""
    plan = plan_chunks(n, 30, 20, workspace_bytes=limit * 4 * 50 + 199)
    rows = [row for start, stop in plan.bounds() for row in range(start, stop)]
    assert rows == list(range(n))
    assert max(sizes(plan)) == plan.rows <= limit
    assert max(sizes(plan)) - min(sizes(plan)) <= 1
    assert plan.chunks == -(-n // limit)
    assert plan.workspace_bytes <= limit * 4 * 50 + 199


def test_float64_halves_the_rows_that_fit():
    single, double = (plan_chunks(1000, 50, 50, itemsize=size, workspace_bytes=400 * 100) for size in (4, 8))
    assert (single.chunks, double.chunks) == (10, 20)


def test_temporaries_are_tiles_of_the_common_width():
    """Widths 30 and 20 with 5 temporaries: (30 + 20 + 5 * 20) * 4 = 600 bytes a row."""
    plan = plan_chunks(10, 30, 20, workspace_bytes=1200, temporaries=5)
    assert (plan.rows, plan.chunks, plan.workspace_bytes) == (2, 5, 1200)


def test_a_workspace_that_holds_no_row_is_refused_with_the_bytes_it_takes():
    with pytest.raises(ValueError, match=r"workspace_bytes must hold at least one row, 1200 bytes.*got 1199; raise it"):
        plan_chunks(10, 200, 100, workspace_bytes=1199)
    assert plan_chunks(10, 200, 100, workspace_bytes=1200).rows == 1


def test_no_rows_need_no_chunk():
    plan = plan_chunks(0, 200, 100, workspace_bytes=10_000)
    assert (plan.rows, plan.chunks, plan.workspace_bytes, plan.bounds()) == (0, 0, 0, [])


def test_the_same_arguments_give_the_same_plan():
    first, again = (plan_chunks(777, 151_936, 152_064, workspace_bytes=64 * MIB, temporaries=2) for _ in range(2))
    assert first == again


def on_a_gpu(n: int, vocab: int, workspace_bytes: int, **options: Any) -> ChunkPlan:
    return plan_chunks(n, vocab, vocab, workspace_bytes=workspace_bytes, block=GPU_BLOCK, **options)


@pytest.mark.parametrize(
    ("n", "limit", "expected"),
    [
        (512, 441, [256, 256]),
        (512, 300, [256, 256]),
        (1000, 511, [256, 384, 360]),
        (1000, 1000, [1000]),
        (1000, 127, [125] * 8),
        (300, 128, [128, 128, 44]),
        (8192, 1413, [1280, 1408, 1408, 1280, 1408, 1408]),
    ],
)
def test_chunks_of_a_gpu_are_multiples_of_128_rows(n, limit, expected):
    """The last but for a rest; as few as fit, of sizes that differ by a block; below 128 rows as on a CPU."""
    assert sizes(on_a_gpu(n, 100, limit * 800)) == expected


@pytest.mark.parametrize("limit", [1, 127, 128, 129, 255, 256, 700, 5000])
@pytest.mark.parametrize("n", [1, 127, 128, 129, 997, 8191])
def test_blocks_hold_every_row_once_within_the_limit(n, limit):
    plan = on_a_gpu(n, 25, limit * 200 + 199)
    assert [row for start, stop in plan.bounds() for row in range(start, stop)] == list(range(n))
    assert len(plan.bounds()) == plan.chunks
    assert max(sizes(plan)) <= plan.rows <= limit
    assert plan.workspace_bytes == plan.rows * 200
    if 128 <= limit < n:
        assert not any(size % 128 for size in sizes(plan)[:-1])


def bf16_products(width: int = 4096, *, weight_grad: bool = True) -> Products:
    return Products(width, width, 2, 2, 2, weight_grad=weight_grad)


@pytest.mark.parametrize("products", [None, bf16_products(), bf16_products(weight_grad=False)], ids=["tiles", "head", "frozen"])
@pytest.mark.parametrize("n", [1, 700, 4096, 8192, 10_000, 100_000])
def test_the_default_workspace_of_a_gpu_holds_4096_rows(n, products):
    wanted = wanted_workspace(n, VOCAB, VOCAB, products=products)
    nbytes = default_workspace("cuda", 140 * GIB, wanted=wanted)
    assert nbytes == default_workspace("cuda", wanted=wanted) == wanted
    plan = on_a_gpu(n, VOCAB, nbytes, products=products)
    assert plan.workspace_bytes <= wanted <= 16 * VOCAB * 4096
    chunks = -(-n // 4096)
    assert plan.chunks <= chunks * 1.15
    if products is not None:
        assert products.traffic(plan) <= products.bytes_per_column(n / chunks, 1 + (products.weight_grad and chunks > 1))


def test_default_workspace():
    """512 MiB on a CPU; on a GPU what is wanted, within the power of two in a quarter of the memory, or 64 MiB."""
    assert default_workspace("cpu") == default_workspace("cpu", MIB, wanted=3 * GIB) == 512 * MIB
    assert default_workspace("cpu", bf16_products=True) == 256 * MIB
    assert default_workspace("xpu") == 2 * GIB
    by_memory = {80 * GIB: 5, 32 * GIB: 5, 20 * GIB: 4, 16 * GIB: 4, 16 * GIB - 1: 2, 8 * GIB - 1: 1}
    for available, gib in by_memory.items():
        assert default_workspace("cuda", available, wanted=5 * GIB) == gib * GIB
    assert default_workspace("cuda", 10 * MIB, wanted=GIB) == default_workspace("cuda", 0, wanted=GIB) == 64 * MIB
    assert default_workspace("cuda", 10 * MIB, wanted=123) == 123


class Allocator:
    """torch's caching allocator on a device of 80 GiB, simulated: what was freed stays reserved."""

    total = 80 * GIB

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.allocated = self.reserved = 0
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (self.total - self.reserved, self.total))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: self.reserved)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: self.allocated)

    def change(self, nbytes: int) -> None:
        self.allocated += nbytes
        self.reserved = max(self.reserved, self.allocated)
        assert self.allocated <= self.total


def planned(n: int) -> ChunkPlan:
    """Return the plan of a call in bfloat16 on the first GPU."""
    tiles = {"itemsize": 4, "temporaries": 0, "products": bf16_products()}
    return plan_rows(n, VOCAB, VOCAB, engine=TRITON, device=CUDA, multiplied=torch.bfloat16, workspace_bytes=None, **tiles)


def test_the_plan_of_a_training_loop_is_the_same_at_every_step(monkeypatch):
    """Weights and optimizer take 20 GiB, activations 22 at the loss, with some noise, and 55 at the peak of backward."""
    allocator = Allocator(monkeypatch)
    allocator.change(20 * GIB)
    plans = []
    for step in range(5):
        activations = 22 * GIB + step * 100 * MIB
        allocator.change(activations)
        plans.append(planned(8192))
        allocator.change(plans[-1].workspace_bytes)
        allocator.change(55 * GIB - activations - plans[-1].workspace_bytes)
        allocator.change(-55 * GIB)
    assert set(plans) == {plans[0]}
    assert (plans[0].rows, plans[0].pile) == (4096, 2)
    assert allocator.total - allocator.reserved == 5 * GIB  # a quarter of which was the workspace of all steps but the first


def test_a_plan_takes_a_quarter_of_what_is_there(monkeypatch):
    """15 GiB are left: a quarter, rounded down to a power of two, is 2 GiB; a plan made without a GPU knows no such bound."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (planned(8192).rows, planned(8192).pile) == (4096, 2)
    allocator = Allocator(monkeypatch)
    allocator.change(65 * GIB)
    plan = planned(8192)
    assert GIB < plan.workspace_bytes <= 2 * GIB
    assert GPU_BLOCK < plan.rows < 1408
    assert plan.rows % GPU_BLOCK == 0


def test_a_small_call_does_not_ask_the_driver(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", None)
    monkeypatch.setattr(torch.cuda, "is_available", None)
    assert sizes(planned(10)) == [10]


def test_large_sizes_do_not_overflow():
    plan = plan_chunks(1 << 20, 256_000, 256_000, workspace_bytes=1 << 31)
    assert plan.rows * 8 * 256_000 <= 1 << 31
    assert sum(sizes(plan)) == 1 << 20


@pytest.mark.parametrize("n", [256, 1024])
def test_peak_memory_follows_the_workspace_and_not_the_rows(n, chunked, device):
    """The largest tensor that a call allocates, forward and backward, is no larger than its workspace."""
    vocab, width, workspace_bytes = 2000, 4, 1 << 20
    hidden = torch.randn(n, width, device=device, requires_grad=True)
    weight = torch.randn(vocab, width, device=device, requires_grad=True)
    teacher = topd.Head(torch.randn(vocab, width, device=device))
    largest = Largest()
    with largest:
        value = topd.linear_divergence(
            hidden, topd.Head(weight), hidden.detach(), teacher, workspace_bytes=workspace_bytes, backend=chunked
        )
        (value * torch.randn(n, device=device)).sum().backward()
    assert hidden.grad.any()
    assert 0 < largest.nbytes <= workspace_bytes
