"""What torch's settings may do to matrix products, and which it refuses.

float32 is float32: matrix products of topd are as exact as their dtype, whatever torch was told about speed.

torch.set_float32_matmul_precision, allow_tf32 and fp32_precision let it take float32 products in TF32 or bfloat16, on CPUs too;
allow_fp16_accumulation lets it sum float16 products in float16, and makes those with float32 out raise. These are settings of a
process. While a call computes they stand at their exact values, and afterwards where they were. (The two about reductions of
reduced precision concern products that are stored in 16 bits, which none is here.)
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch

_LOCK = Lock()


class _Setting:
    """One of torch's settings, held at its exact value while any thread needs it: one that leaves early must not make the
    products of another less exact.

    Args:
        owner, name: where torch has it.
        exact: what it is held at.
        inexact: the values that it is held instead of.
        inherited: a value that stands for a more general setting's; None where there is none.
    """

    def __init__(self, owner: Any, name: str, exact: object, inexact: tuple[object, ...], inherited: object = None) -> None:
        self.owner, self.name, self.exact, self.inexact, self.inherited = owner, name, exact, inexact, inherited
        self.holders = 0
        self.before: object = None

    def hold(self) -> None:
        """Set it where it is not exact; the last `release` sets it back."""
        with _LOCK:
            self.holders += 1
            value = getattr(self.owner, self.name)
            if value in self.inexact:
                setattr(self.owner, self.name, self.exact)
                self.before = value

    def release(self) -> None:
        """Undo one `hold`."""
        with _LOCK:
            self.holders -= 1
            if self.holders or self.before is None:
                return
            before, self.before = self.before, None
            if getattr(self.owner, self.name) != self.exact:  # set anew in the meantime: that stands
                return
            # What is read may come from a more general setting; then it must follow that one again.
            setattr(self.owner, self.name, before if self.inherited is None else self.inherited)
            if getattr(self.owner, self.name) != before:
                setattr(self.owner, self.name, before)


_CUDA, _MKLDNN = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
_SETTINGS = {
    "cuda": (
        _Setting(_CUDA, "fp32_precision", "ieee", ("tf32",), "none"),
        _Setting(_CUDA, "allow_fp16_accumulation", False, (True,)),
    ),
    "cpu": (_Setting(_MKLDNN, "fp32_precision", "ieee", ("tf32", "bf16"), "none"),),
}


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Take the matrix products on this device as exactly as their dtype. Nothing is done while torch.compile traces: the ops of
    topd are opaque to it and come here when they run; what is plain torch is the compiler's."""
    settings = () if torch.compiler.is_compiling() else _SETTINGS.get(device.type, ())
    for setting in settings:
        setting.hold()
    try:
        yield
    finally:
        for setting in settings:
            setting.release()


@functools.cache
def refused_products(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return what torch says where it takes no products of this 16-bit dtype with float32 out on this GPU, as some builds for
    ROCm do; None where it takes them. Each of the three forms that are used is tried, once in a process, without waiting."""
    if not torch.cuda.is_available():  # a plan for a device that is not here
        return None
    a, out = torch.ones(16, 16, dtype=dtype, device=device), torch.empty(16, 16, dtype=torch.float32, device=device)
    try:
        with exact_products(device):
            torch.ops.aten.mm.dtype_out(a, a.T, out.dtype, out=out)
            for beta in (0.0, 1.0):
                torch.ops.aten.addmm.dtype_out(out, a.T, a, out.dtype, beta=beta, alpha=0.5, out=out)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return None
