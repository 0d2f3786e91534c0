"""Which implementations this installation has. Importing this loads the C++ extension where there is one; the Triton kernels
are imported on first use."""

import functools
import importlib
import importlib.util
import platform
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch

from topd.options import BackendName
from topd.products import refused_products

NAMES: tuple[str, ...] = get_args(BackendName)
_REBUILD = "in a clone of topd, `TOPD_BUILD_CPP=1 pip install --no-build-isolation .` builds it"


@dataclass(frozen=True)
class Backend:
    """One backend: whether it can run here and what it is, or why it cannot. True in a condition where it can. `interpreted`:
    it runs in Triton's interpreter, on CPU tensors."""

    name: BackendName
    available: bool
    detail: str
    interpreted: bool = False

    def __bool__(self) -> bool:
        return self.available

    def __str__(self) -> str:
        return f"{self.name}: {'available' if self.available else 'not available'}, {self.detail}"


def _variants() -> list[str]:
    """Return the builds of the extension that this processor can run, best first; torch's own reading of the processor
    decides."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return ["default"]
    capability = torch.backends.cpu.get_cpu_capability()
    return {"AVX512": ["avx512", "avx2"], "AVX2": ["avx2"]}.get(capability, [])


def _load_cpp(folder: Path, variants: list[str]) -> Backend:
    """Load the best build in the folder that loads; it registers its kernels with the dispatcher."""
    if not variants:
        capability = torch.backends.cpu.get_cpu_capability()
        return Backend("cpp", False, f"needs AVX2 or AVX-512, torch sees {capability} on this processor")
    problems = []
    for variant in variants:
        for path in sorted(folder.glob(f"_cpp_{variant}.*")):
            try:
                torch.ops.load_library(str(path))
            except OSError as error:
                problems.append(f"{path.name} does not load ({str(error).partition(chr(10))[0]})")
            else:
                return Backend("cpp", True, f"{path.name}, CPU tensors")
    if problems:
        return Backend("cpp", False, f"{'; '.join(problems)}; {_REBUILD} against torch {torch.__version__}")
    return Backend("cpp", False, f"the C++ extension was not built; {_REBUILD} with a C++ compiler")


_CPP = _load_cpp(Path(__file__).parent, _variants())
_HAS_CPP = _CPP.available


def multiplies_bf16() -> bool:
    """Tell whether the C++ extension can multiply bfloat16 with float32 out: the processor has AVX512_BF16 or AMX, and oneDNN,
    whose kernels do it, is not switched off."""
    return _HAS_BF16 and bool(torch.backends.mkldnn.enabled)


def _has_bf16() -> bool:
    if not _CPP.available or not torch.backends.mkldnn.is_available() or "avx512" not in _CPP.detail:
        return False
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


_HAS_BF16 = _has_bf16()


def missing_extension() -> str | None:
    """Return why CPU calls run on "eager" and what to do about it, in one line; None where the compiled backend is here or no
    build of it runs on this processor."""
    if _HAS_CPP or not _variants():
        return None
    return f'topd runs CPU calls on its slower backend "eager": {_CPP.detail}'


@functools.cache
def _warn_once() -> None:
    line = missing_extension()
    if line is not None:
        warnings.warn(line, UserWarning, stacklevel=callers_level())


def callers_level() -> int:
    """Return the stacklevel, for the function that asks, of the nearest frame outside topd and torch."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("topd", "torch"):
        frame, level = frame.f_back, level + 1
    return level


def _warn_about_eager() -> None:
    """Warn, once in a process, that a CPU call which chose no backend runs on "eager", because the compiled one is missing."""
    _warn_once()


# What torch.compiler.assume_constant_result sets: torch.compile runs this while it traces instead of tracing into it.
_warn_about_eager._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _kernels() -> Any:
    """Return the Triton kernels; importing them registers them for CUDA and ROCm."""
    return importlib.import_module("topd_kernels.register")


def _triton_facts() -> tuple[bool, str, bool]:
    """Return the fields of Triton's Backend as constants, which torch.compile takes; imports the kernels on first use, since
    that takes a while."""
    if importlib.util.find_spec("triton") is None:
        return False, 'triton is not installed; install it (>= 3.6, < 3.10), or use "eager" on a GPU', False
    if importlib.util.find_spec("topd_kernels") is None:
        return False, 'topd_kernels is not installed; install topd whole, or use "eager" on a GPU', False
    if _kernels().interpreted():
        return True, "CPU tensors through Triton's interpreter (TRITON_INTERPRET is set), for tests", True
    if not torch.cuda.is_available():
        return False, "torch sees no CUDA or ROCm device; TRITON_INTERPRET=1 runs the kernels on CPU tensors", False
    return True, f"Triton kernels on {torch.cuda.get_device_name()}", False


# What torch.compiler.assume_constant_result sets; calling that would import the whole compiler with the package.
_triton_facts._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _load_triton() -> Backend:
    return Backend("triton", *_triton_facts())


def triton_launcher(op: str) -> Callable[..., Any]:
    """Return the launcher of topd::<op>, for CPU tensors in Triton's interpreter: there the dispatcher knows the C++
    kernels."""
    launcher: Callable[..., Any] = _kernels().LAUNCHERS[op]
    return launcher


def _refused() -> str:
    """Return the word about 16-bit products that torch refuses on the current GPU; empty where it refuses none."""
    if not torch.cuda.is_available():
        return ""
    device = torch.device("cuda", torch.cuda.current_device())
    reasons = {dtype: refused_products(device, dtype) for dtype in (torch.bfloat16, torch.float16)}
    refused = {str(dtype).removeprefix("torch."): reason for dtype, reason in reasons.items() if reason is not None}
    if not refused:
        return ""
    reason = next(iter(refused.values()))
    return f"; {' and '.join(refused)} heads are widened to float32, since torch refuses such products here: {reason}"


_WITHOUT_TRITON = {
    "reference": Backend("reference", True, "eager torch on full logits, any device: the definition of the math"),
    "eager": Backend("eager", True, "torch in chunks, any device"),
    "cpp": _CPP,
}


def backends() -> dict[str, Backend]:
    """Return what this installation has: a `Backend` for each of "reference", "eager", "cpp" and "triton".

    Returns:
        By name, whether it is available, and what it is or why it is missing. `Backend` is true where available.
    """
    refused = _refused()
    every = {**_WITHOUT_TRITON, "triton": _load_triton()}
    on_gpus = {name: replace(every[name], detail=every[name].detail + refused) for name in ("eager", "triton") if every[name]}
    return {**every, **on_gpus} if refused else every


def choose_backend(backend: BackendName | None, device: torch.device) -> BackendName:
    """Return the backend to run on this device. A backend asked for by name never falls back; a CPU call that names none warns
    once in a process where the compiled backend could run here and is missing.

    Raises:
        TypeError, ValueError: unknown, missing, or not for this device.
    """
    if backend is None:
        if device.type == "cpu":
            if _HAS_CPP:
                return "cpp"
            _warn_about_eager()
            return "eager"
        return "triton" if device.type == "cuda" and _load_triton() else "eager"
    if not isinstance(backend, str):
        raise TypeError(f"backend must be None or one of {', '.join(map(repr, NAMES))}, got {type(backend).__name__}")
    if backend not in NAMES:
        raise ValueError(f"backend must be None or one of {', '.join(map(repr, NAMES))}, got {backend!r}")
    if not (state := _load_triton() if backend == "triton" else _WITHOUT_TRITON[backend]):
        raise ValueError(f'backend "{backend}" is not available here: {state.detail}')
    if backend == "cpp" and device.type != "cpu":
        raise ValueError(f'backend "cpp" runs on CPU tensors, got {device}; leave backend None to choose by device')
    if backend == "triton" and device.type != "cuda" and not state.interpreted:
        raise ValueError(
            f'backend "triton" runs on CUDA and ROCm tensors, got {device}; leave backend None to choose by device'
        )
    return backend
