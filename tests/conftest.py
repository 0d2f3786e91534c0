"""Fixtures: the device, the backends that run on it, and a fixed seed for every test."""

import os
import sys
import warnings

import pytest
import torch

if not torch.cuda.is_available():  # read by Triton when the kernels are defined: here they run in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

import topd
from topd.backends import Backend, choose_backend

# Without the C++ extension the first CPU call warns, once in a process: here, and not in the test that happens to come first.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    choose_backend(None, torch.device("cpu"))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA or ROCm device on this machine")
    return torch.device(request.param)


@pytest.fixture(params=["reference", "eager", "cpp"])
def backend(request: pytest.FixtureRequest, device: torch.device) -> str:
    found = topd.backends()[request.param]
    if not found:
        pytest.skip(str(found))
    if request.param == "cpp" and device.type != "cpu":
        pytest.skip("the cpp backend takes CPU tensors only")
    return request.param


@pytest.fixture(params=["reference", "eager", "cpp", "triton"])
def every_backend(request: pytest.FixtureRequest, device: torch.device) -> str:
    """Triton too, where its kernels run: on a GPU, or in the interpreter."""
    found = topd.backends()[request.param]
    if not found or (request.param == "cpp" and device.type != "cpu"):
        pytest.skip(str(found))
    if request.param == "triton" and device.type == "cpu" and not found.interpreted:
        pytest.skip("the kernels are not interpreted here")
    return request.param


@pytest.fixture
def without_extension(monkeypatch: pytest.MonkeyPatch) -> str:
    """An installation without the C++ extension, which has not warned yet; the line it will say."""
    module = sys.modules["topd.backends"]
    missing = Backend("cpp", False, "the C++ extension was not built; build it")
    monkeypatch.setattr(module, "_CPP", missing)
    monkeypatch.setattr(module, "_HAS_CPP", False)
    monkeypatch.setitem(module._WITHOUT_TRITON, "cpp", missing)
    monkeypatch.setattr(module, "_variants", lambda: ["avx2"])
    module._warn_once.cache_clear()
    return f'topd runs CPU calls on its slower backend "eager": {missing.detail}'


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The demo's options that name a tiny teacher and a tiny student."""
    from tiny_demo import saved

    folder = tmp_path_factory.mktemp("models")
    return ["--teacher", saved(folder / "teacher", 2, 0), "--student", saved(folder / "student", 1, 1)]


@pytest.fixture
def small_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    from tiny_demo import QUICK

    from topd_demo import start

    monkeypatch.setattr(start, "QUICK", QUICK)
