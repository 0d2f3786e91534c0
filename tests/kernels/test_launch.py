"""What a launch refuses, and names that two sides must agree on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode

pytest.importorskip("triton", reason="triton is not installed")

from triton.runtime import driver
from triton.runtime.jit import JITFunction

from topd.scores import FIELDS
from topd_kernels.shared import records
from topd_kernels.shared.launch import Launch, splits_of_rows
from topd_kernels.weighted_gather.kernels import gather
from topd_kernels.weighted_gather.launches import launches


@pytest.fixture
def launch() -> Launch:
    ids = torch.zeros(2, 3, dtype=torch.int64)
    return launches(torch.zeros(2, 5), torch.zeros(4, 5), ids, torch.zeros(2, 3))[0]


def test_an_unknown_name_is_refused(launch):
    with pytest.raises(TypeError, match=r"^gather has no parameter Tabel, blocks; it has Out, out_stride, Table, .*, BLOCK$"):
        replace(launch, arguments={**launch.arguments, "Tabel": 1}, constants={"BLOCK": 512, "blocks": 1})


def test_a_missing_name_is_refused(launch):
    with pytest.raises(TypeError, match=r"^a launch of gather must set BLOCK, width$"):
        Launch(gather, (1,), {name: value for name, value in launch.arguments.items() if name != "width"}, {}, 4)


def test_a_name_that_is_set_twice_is_refused(launch):
    with pytest.raises(TypeError, match=r"^a launch of gather sets width twice$"):
        replace(launch, constants={**launch.constants, "width": 5})


class Kernel:
    """A kernel's stand-in that notes which device is current when it is launched."""

    arg_names = ("Out", "Table", "count")
    __name__ = "stand_in"

    def __init__(self) -> None:
        self.current, self.launched_on = torch.device("cuda:0"), []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda **_: self.launched_on.append(self.current)

    @contextmanager
    def as_current(self, device: torch.device) -> Iterator[None]:
        """Stand for torch.cuda.device."""
        before, self.current = self.current, device
        try:
            yield
        finally:
            self.current = before


def tensors_on(*devices: str) -> list[torch.Tensor]:
    with FakeTensorMode():
        return [torch.empty(3, device=device) for device in devices]


FAKE_DEVICES = pytest.mark.skipif(torch.cuda.device_count() == 1, reason="where there is a GPU, a fake tensor needs its own")


@FAKE_DEVICES
def test_a_launch_is_on_the_device_of_its_tensors_whichever_is_current(monkeypatch):
    kernel = Kernel()
    monkeypatch.setattr(torch.cuda, "device", kernel.as_current)
    for device in ("cuda:1", "cuda:0", "cpu"):
        out, table = tensors_on(device, device)
        Launch(kernel, (1,), {"Out": out, "Table": table, "count": 3}, {}, 4).run()
    assert kernel.launched_on == [torch.device("cuda:1"), torch.device("cuda:0"), torch.device("cuda:0")]
    assert kernel.current == torch.device("cuda:0")


class AskedError(Exception):
    """Triton has asked for a stream."""


def copied(out, table, count):
    """A kernel that is never compiled."""


@FAKE_DEVICES
def test_triton_launches_on_the_stream_of_that_device(monkeypatch):
    """Triton's own launch up to where it asks its driver for a stream: the current one of the device that is current then."""
    place, asked = Kernel(), []

    def stream_of(device: int) -> None:
        asked.append(device)
        raise AskedError

    monkeypatch.setattr(torch.cuda, "device", place.as_current)
    stand_in = SimpleNamespace(get_current_device=lambda: place.current.index, get_current_stream=stream_of)
    monkeypatch.setattr(driver, "_active", stand_in)
    for device in ("cuda:1", "cuda:0"):
        out, table = tensors_on(device, device)
        with pytest.raises(AskedError):
            Launch(JITFunction(copied), (1,), {"out": out, "table": table, "count": 3}, {}, 4).run()
    assert asked == [1, 0]


@FAKE_DEVICES
def test_tensors_on_several_devices_are_refused_by_name():
    kernel = Kernel()
    out, table = tensors_on("cuda:1", "cuda:0")
    with pytest.raises(ValueError, match=r"^Table of stand_in must be on cuda:1 as Out is, got cuda:0; move it there$"):
        Launch(kernel, (1,), {"Out": out, "Table": table, "count": 3}, {}, 4).run()
    assert not kernel.launched_on


def test_scores_are_in_the_order_of_the_fields():
    for place, field in enumerate(FIELDS):
        assert getattr(records, f"SCORE_{field.upper()}").value == place
    assert records.SCORES.value == len(FIELDS)


def test_programs_that_share_a_row():
    """32 programs a multiprocessor, each with four blocks at least, and 64 a row at most."""
    assert [splits_of_rows(rows, 1000, 100) for rows in (0, 1, 50, 100, 3199, 3200)] == [64, 64, 64, 32, 2, 1]
    assert [splits_of_rows(1, blocks, 100) for blocks in (0, 3, 8, 100)] == [1, 1, 2, 25]
