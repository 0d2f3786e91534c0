"""Fixtures: the device, the backends that run on it, and a fixed seed for every test."""

import os

import pytest
import torch

if not torch.cuda.is_available():  # read by Triton when the kernels are defined: here they run in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

import topd


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
