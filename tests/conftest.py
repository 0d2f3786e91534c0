"""What every test has: a fixed seed, and the devices and backends that are here.

A test that names `device`, `backend`, `chunked` or `every_backend` among its arguments is collected once for each that can
run on this machine; what cannot run here is not collected, and the end of the run says so in a line.
"""

import gc
import os
import sys
import warnings
from collections.abc import Iterator

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

# The arguments that stand for a backend, each with those that it goes through.
BACKENDS = {
    "backend": ("reference", "eager", "cpp"),
    "chunked": ("eager", "cpp"),  # those that hold a chunk of logits at a time
    "every_backend": ("reference", "eager", "cpp", "triton"),
}
HERE = topd.backends()
# What a marker asks for, whether it is here, and the line to say where it is not.
NEEDS = {
    "gpu": (torch.cuda.is_available(), "no CUDA or ROCm device: the tests that run on one"),
    "cpp": (bool(HERE["cpp"]), "no C++ extension: the tests of its kernels, and those of the backend cpp"),
}


# The files that take longest, which two workers begin with, so that neither is left with one of them at the end.
LONGEST = (
    "test_examples.py",
    "test_split_models.py",
    "test_tensor_parallel.py",
    "test_fsdp2_trainers.py",
    "test_sequence_parallel.py",
    "test_sharded_divergence.py",
    "test_fsdp2.py",
    "test_sharded_memory.py",
    "test_teacher_elsewhere.py",
    "test_triton_transport.py",
    "test_compiled_dynamic.py",
    "test_triton_divergence_rows.py",
    "test_ops.py",
    "test_integrations_trl.py",
    "test_data_parallel.py",
    "test_model_checks.py",
    "test_windows.py",
    "test_triton_ops.py",
    "test_masked_rows.py",
)


def runs_on(backend: str, device: torch.device) -> bool:
    """Return whether a backend is here and takes tensors of the device."""
    if not HERE[backend] or (backend == "cpp" and device.type != "cpu"):
        return False
    return backend != "triton" or device.type != "cpu" or HERE["triton"].interpreted


def places(names: set[str]) -> Iterator[tuple[torch.device, str | None]]:
    """Yield the devices and, where the names hold an argument for it, the backends that a test is run with."""
    backends = next((backends for name, backends in BACKENDS.items() if name in names), (None,))
    for device in (torch.device("cpu"), torch.device("cuda")):
        if device.type == "cuda" and not ("device" in names and torch.cuda.is_available()):
            continue
        yield from ((device, backend) for backend in backends if backend is None or runs_on(backend, device))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give a test its devices and backends, in pairs that can run; those on a GPU carry the marker `gpu`."""
    given = {
        name.strip()
        for mark in metafunc.definition.iter_markers("parametrize")
        for name in (mark.args[0].split(",") if isinstance(mark.args[0], str) else mark.args[0])
    }
    names = [name for name in ("device", *BACKENDS) if name in metafunc.fixturenames and name not in given]
    if not names:
        return
    cases = []
    for device, backend in places(set(names)):
        values = [device if name == "device" else backend for name in names]
        marks = [pytest.mark.gpu] if device.type == "cuda" else []
        cases.append(pytest.param(*values, id="-".join(map(str, values)), marks=marks))
    metafunc.parametrize(names, cases)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests whose marker asks for what is not here; let the longest files come first."""
    absent = [name for name, (here, _) in NEEDS.items() if not here]
    kept, left_out = [], []
    for item in items:
        (left_out if any(item.get_closest_marker(name) for name in absent) else kept).append(item)
    config.hook.pytest_deselected(items=left_out)
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items[:] = sorted(kept, key=lambda item: ranks.get(item.path.name, len(LONGEST)))


def pytest_collection_finish() -> None:
    """Set aside what the imports made: gc.collect, which the demo calls around each measurement, took 0.3 s to walk over it."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    lines = [line for here, line in NEEDS.values() if not here]
    if not runs_on("triton", torch.device("cuda" if torch.cuda.is_available() else "cpu")):
        lines.append("no Triton: the tests of its kernels")
    if lines:
        terminalreporter.write_line("not collected here: " + "; ".join(lines))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def without_extension(monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the line that an installation without the C++ extension says at its first CPU call, in such an installation."""
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
    """Return the demo's options that name a tiny teacher and a tiny student."""
    from tiny_demo import saved

    folder = tmp_path_factory.mktemp("models")
    return ["--teacher", saved(folder / "teacher", 2, 0), "--student", saved(folder / "student", 1, 1)]


@pytest.fixture
def small_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    from tiny_demo import QUICK

    from topd_demo import run_folder

    monkeypatch.setattr(run_folder, "QUICK", QUICK)
