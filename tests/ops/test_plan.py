"""The chunk planner: a pure function of rows, widths, bytes and backend."""

import pytest
import torch
from memory_watch import Largest

import topd
from topd.ops.shared.loop import workspace
from topd.ops.shared.plan import MIB, default_workspace, plan_chunks


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


def test_default_workspace():
    """512 MiB on a CPU; on a GPU 2 GiB, or half of it, and so on, down to a quarter of the memory or 64 MiB."""
    assert default_workspace("cpu") == 512 * MIB
    assert default_workspace("cpu", MIB) == 512 * MIB
    assert default_workspace("cpu", bf16_products=True) == 256 * MIB
    assert (
        default_workspace("cuda")
        == default_workspace("cuda", 80_000 * MIB)
        == default_workspace("cuda", 8192 * MIB)
        == 2048 * MIB
    )
    assert default_workspace("cuda", 8191 * MIB) == default_workspace("cuda", 4096 * MIB) == 1024 * MIB
    assert default_workspace("cuda", 10 * MIB) == 64 * MIB


class Allocator:
    """torch's caching allocator on a device of 80 GiB, simulated: what was freed stays reserved."""

    total = 80 * 1024 * MIB

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.allocated = self.reserved = 0
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (self.total - self.reserved, self.total))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: self.reserved)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: self.allocated)

    def change(self, nbytes: int) -> None:
        self.allocated += nbytes
        self.reserved = max(self.reserved, self.allocated)
        assert self.allocated <= self.total


def test_the_plan_of_a_training_loop_is_the_same_at_every_step(monkeypatch):
    """Weights and optimizer take 40 GiB, activations 27 at the loss, with some noise, and 38 at the peak of backward."""
    allocator, gib = Allocator(monkeypatch), 1024 * MIB
    allocator.change(40 * gib)
    plans = []
    for step in range(5):
        activations = 27 * gib + step * 100 * MIB
        allocator.change(activations)
        nbytes = workspace(torch.device("cuda:0"), None, torch.bfloat16)
        plans.append(plan_chunks(8192, 151_936, 151_936, workspace_bytes=nbytes))
        allocator.change(38 * gib - activations)
        allocator.change(-38 * gib)
    assert set(plans) == {plan_chunks(8192, 151_936, 151_936, workspace_bytes=2048 * MIB)}
    assert allocator.total - allocator.reserved == 2 * gib  # a quarter of which was the workspace of all steps but the first


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
