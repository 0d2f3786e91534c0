"""How many binaries Triton has made of each kernel on the devices of this machine."""

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from typing import Any


def kernels() -> dict[str, Any]:
    """Return every kernel of topd_kernels that can be launched, by module and name."""
    package = importlib.import_module("topd_kernels")
    by_name = {}
    for module in pkgutil.walk_packages(package.__path__, "topd_kernels."):
        loaded = importlib.import_module(module.name)
        for name, value in vars(loaded).items():
            if hasattr(value, "device_caches") and getattr(value, "__module__", "") == loaded.__name__:
                by_name[f"{module.name}.{name.strip('_')}"] = value
    return by_name


def compiled(kernel: Any) -> int:
    """Return the binaries of a kernel on all devices: the first entry of a device's cache is a dict of them."""
    return sum(len(cache[0]) for cache in kernel.device_caches.values())


def binaries_of_more_rows(run: Callable[[int], None], counts: Sequence[int]) -> dict[str, tuple[int, int]]:
    """Return the kernels that had more binaries after all numbers of rows than after the first: how many, then and now.

    What was compiled before is forgotten (Triton keeps it on disk).
    """
    every = kernels()
    for kernel in every.values():
        kernel.device_caches.clear()
    run(counts[0])
    before = {name: compiled(kernel) for name, kernel in every.items()}
    for count in counts[1:]:
        run(count)
    after = {name: compiled(kernel) for name, kernel in every.items()}
    return {name: (before[name], after[name]) for name in every if before[name] and after[name] > before[name]}
