"""Block sizes by family of devices, and the file of a user's own."""

import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
from topd_kernels.divergence_rows import launches as divergence_rows
from topd_kernels.shared import blocks
from topd_kernels.shared.blocks import KERNELS, Sizes, default_sizes, family_of, lanes_of

NVIDIA = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120")
WIDE = ("gfx90a", "gfx942", "gfx950")
NAME = "NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize("family", NVIDIA)
def test_sizes_on_nvidia(family):
    sizes = {
        (kernel, itemsize, heavy): default_sizes(kernel, family, itemsize, heavy=heavy)
        for kernel, itemsize, heavy in [
            ("statistics", 4, False),
            ("sweep", 4, False),
            ("sweep", 4, True),
            ("sweep", 8, True),
            ("statistics", 8, False),
            ("rest", 4, False),
            ("rest", 8, False),
            ("gradient", 4, False),
            ("gradient", 8, False),
            ("gather", 2, False),
            ("scatter", 4, False),
        ]
    }
    assert [tuple(size) for size in sizes.values()] == [
        (512, 1), (1024, 4), (512, 4), (256, 4),
        (256, 1), (512, 1), (256, 1), (2048, 4), (1024, 4), (512, 4), (512, 4),
    ]  # fmt: skip


@pytest.mark.parametrize("family", WIDE)
@pytest.mark.parametrize(
    ("kernel", "itemsize"),
    [(kernel, size) for kernel in KERNELS for size in (2, 4, 8) if size > 2 or kernel in ("gather", "scatter")],
)
def test_each_lane_of_a_wide_wave_loads_16_bytes(kernel, itemsize, family):
    assert lanes_of(family) == 64
    for heavy in (False, True):
        block, num_warps = default_sizes(kernel, family, itemsize, heavy=heavy)
        # With two entries a lane a sweep in float64 runs out of scalar registers.
        least = 8 if (kernel, itemsize) == ("sweep", 8) else 16
        assert block / (num_warps * 64) * itemsize >= least


def test_families_are_named_as_their_targets(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    assert family_of(SimpleNamespace(major=9, minor=0)) == "sm_90"
    assert family_of(SimpleNamespace(major=12, minor=0)) == "sm_120"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert family_of(SimpleNamespace(major=9, minor=4, gcnArchName="gfx942:sramecc+:xnack-")) == "gfx942"


def test_an_unknown_kernel_is_refused():
    with pytest.raises(ValueError, match=r"one of statistics, sweep, .*, got 'swep'"):
        default_sizes("swep", "sm_90", 4)


def test_launches_take_the_family_that_they_are_told():
    tiles = torch.empty(2, 4000, device="meta"), torch.empty(2, 4000, device="meta")
    spec = divergence_rows.Spec(1.0, None, 1.0, None, 1.0, "reverse_kl", 0.0, 0.0)
    for family, expected in ((None, (512, 1024)), ("sm_90", (512, 1024)), ("gfx942", (1024, 2048))):
        order, _ = divergence_rows.launches(*tiles, None, None, None, spec, tiles[0], False, family=family)
        by_name = {launch.name: launch.constants["BLOCK"] for launch in order}
        assert (by_name["statistics"], by_name["sweep"]) == expected


def written(path, **changes):
    content = {"version": blocks.VERSION, "device": NAME, "kernels": {"sweep 4 heavy": {"block": 2048, "num_warps": 8}}}
    path.write_text(json.dumps(content | changes))
    return path


def test_a_file_goes_before_the_family(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks.Path, "home", lambda: tmp_path)
    path = blocks.file_of(NAME)
    assert path == tmp_path / ".cache" / "topd" / "blocks-2-nvidia-h100-80gb-hbm3.json"
    assert blocks.read(path, NAME) == {}
    path.parent.mkdir(parents=True)
    sizes = {"sweep 4 heavy": Sizes(2048, 8)}
    path.write_text(json.dumps(blocks.content_of(NAME, sizes)))
    assert blocks.read(path, NAME) == sizes
    monkeypatch.setattr(torch.version, "hip", None)
    here = SimpleNamespace(name=NAME, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: here)
    blocks._of_index.cache_clear()
    device = blocks.device_of(torch.device("cuda", 0))
    blocks._of_index.cache_clear()
    assert device.sizes("sweep", 4, heavy=True) == (2048, 8)
    assert device.sizes("sweep", 4) == (1024, 4)
    assert blocks.device_of(torch.device("cuda", 0), "gfx942").sizes("sweep", 4, heavy=True) == (1024, 4)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"version": 1}, "be of version 2 for NVIDIA H100 80GB HBM3, got 1"),
        ({"device": "NVIDIA B200"}, "be of version 2 for NVIDIA H100 80GB HBM3, got 2 for 'NVIDIA B200'"),
        ({"more": 1}, "hold version, device and kernels, and nothing else"),
        ({"kernels": []}, "hold an object of kernels, got "),
        ({"kernels": {"sweep": {}}}, "name kernels as .* is, got 'sweep'"),
        ({"kernels": {"sweep 4": {"block": 512}}}, "give 'sweep 4' a block and num_warps, and nothing else"),
        ({"kernels": {"sweep 4": {"block": 500, "num_warps": 4}}}, "a power of two from 32 to 8192 as block, got 500"),
        ({"kernels": {"sweep 4": {"block": 512, "num_warps": True}}}, "a power of two from 1 to 16 as num_warps, got True"),
    ],
)
def test_a_file_with_anything_else_is_refused(tmp_path, changes, rule):
    with pytest.raises(ValueError, match=f"{rule}.*; remove it, and python -m topd_bench.gpu --tune writes another"):
        blocks.read(written(tmp_path / "blocks.json", **changes), NAME)


def test_a_file_that_is_not_json_is_refused(tmp_path):
    path = tmp_path / "blocks.json"
    path.write_text("{")
    with pytest.raises(ValueError, match="must be JSON, got "):
        blocks.read(path, NAME)
