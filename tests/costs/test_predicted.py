"""The time of the row kernels from shapes alone, by hand and against the account, which asks the launches."""

import pytest

from topd.costs import predicted
from topd.costs.devices import DEVICES, Device
from topd.costs.products import Seconds, default_plan
from topd_bench.cases import GPU_CASES, Case

SMALL = Case("small", n=512, vocab=1024, student_width=256, teacher_width=512)


@pytest.mark.parametrize(("loss", "moved"), [("reverse_kl", 18), ("forward_kl", 18), ("jsd", 26)])
def test_kernels_that_are_bound_by_bytes(loss, moved):
    device = Device("x", "sm_90", processors=1, lanes=1, clock=1e12, matrix_flop=1.0, bandwidth=100.0, memory_bytes=1e9)
    assert predicted.kernel_time(SMALL, device, loss) == (0.0, pytest.approx(512 * 1024 * moved / 100), 0.0)


@pytest.mark.parametrize("loss", ["reverse_kl", "jsd"])
@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_times_are_the_account_s(device, loss):
    account = pytest.importorskip("tools.account", reason="triton is not installed")
    for shape in GPU_CASES.values():
        plan = default_plan(shape, device, weight_grad=True)
        time = predicted.predicted_time(shape, device, loss, plan, weight_grad=True)
        assert time == pytest.approx(account.predicted(shape, device, loss, plan, weight_grad=True), rel=0.01)


def test_the_bound_is_the_largest_part():
    assert predicted.bound(Seconds(1.0, 2.0, 0.5)) == "bytes"
    assert predicted.bound(Seconds(3.0, 2.0, 0.5)) == "products"
