"""Which implementations this installation has. Importing this loads the C++ extension where there is one."""

import platform
from dataclasses import dataclass
from pathlib import Path

import torch

NAMES = ("reference", "eager", "cpp", "triton")


@dataclass(frozen=True)
class Backend:
    """One backend: whether it can run here and what it is, or why it cannot. True in a condition where it can."""

    name: str
    available: bool
    detail: str

    def __bool__(self) -> bool:
        return self.available

    def __str__(self) -> str:
        return f"{self.name}: {'available' if self.available else 'not available'}, {self.detail}"


def _variants() -> list[str]:
    """Builds of the extension that this processor can run, best first; torch's own reading of the processor decides."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return ["default"]
    capability = torch.backends.cpu.get_cpu_capability()
    return {"AVX512": ["avx512", "avx2"], "AVX2": ["avx2"]}.get(capability, [])


def _load_cpp() -> Backend:
    """Load the extension, which registers its kernels with the dispatcher."""
    folder = Path(__file__).parent
    variants = _variants()
    if not variants:
        capability = torch.backends.cpu.get_cpu_capability()
        return Backend("cpp", False, f"needs AVX2 or AVX-512, torch sees {capability} on this processor")
    for variant in variants:
        for path in sorted(folder.glob(f"_cpp_{variant}.*")):
            try:
                torch.ops.load_library(str(path))
            except OSError as error:
                return Backend(
                    "cpp", False, f"{path.name} does not load ({error}); rebuild it against torch {torch.__version__}"
                )
            return Backend("cpp", True, f"{path.name}, CPU tensors")
    return Backend("cpp", False, "the extension was not built; install with a C++ compiler and without TOPD_BUILD_CPP=0")


_CPP = _load_cpp()
_HAS_CPP = _CPP.available


def backends() -> dict[str, Backend]:
    """What this installation has: a `Backend` for each of "reference", "eager", "cpp" and "triton".

    Returns:
        By name, whether it is available, and what it is or why it is missing. `Backend` is true where available.
    """
    return {
        "reference": Backend("reference", True, "eager torch on full logits, any device: the definition of the math"),
        "eager": Backend("eager", True, "torch in chunks, any device"),
        "cpp": _CPP,
        "triton": Backend("triton", False, 'this version has no Triton kernels; on a GPU the default is "eager"'),
    }


def choose_backend(backend: str | None, device: torch.device) -> str:
    """The backend to run on this device. A backend asked for by name never falls back.

    Raises:
        TypeError, ValueError: unknown, missing, or not for this device.
    """
    if backend is None:
        return "cpp" if device.type == "cpu" and _HAS_CPP else "eager"
    if not isinstance(backend, str):
        raise TypeError(f"backend must be None or one of {', '.join(map(repr, NAMES))}, got {type(backend).__name__}")
    if backend not in NAMES:
        raise ValueError(f"backend must be None or one of {', '.join(map(repr, NAMES))}, got {backend!r}")
    if not (found := backends()[backend]):
        raise ValueError(f'backend "{backend}" is not available here: {found.detail}')
    if backend == "cpp" and device.type != "cpu":
        raise ValueError(f'backend "cpp" runs on CPU tensors, got {device}; leave backend None to choose by device')
    return backend
