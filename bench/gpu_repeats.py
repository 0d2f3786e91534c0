"""Repeatability, and how many binaries Triton has made of a kernel."""

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.gpu_judge import Evidence, Part


def again(name: str, run: Callable[[], Mapping[str, Tensor]]) -> Evidence:
    """Entries that differ between two runs; NaN equals itself."""
    first, second = run(), run()
    parts = {}
    for key, value in first.items():
        same = (value == second[key]) | ((value != value) & (second[key] != second[key]))
        parts[key] = Part((~same).sum().reshape(1), torch.zeros(1, device=value.device), 0.0, 1.0)
    return Evidence(f"{name} again, entries that differ", parts)


def kernels() -> dict[str, Any]:
    """Every kernel of topd_kernels that can be launched, by module and name."""
    package = importlib.import_module("topd_kernels")
    found = {}
    for module in pkgutil.iter_modules(package.__path__):
        loaded = importlib.import_module(f"topd_kernels.{module.name}")
        for name, value in vars(loaded).items():
            if hasattr(value, "device_caches") and getattr(value, "__module__", "") == loaded.__name__:
                found[f"{module.name}.{name.strip('_')}"] = value
    return found


def compiled(kernel: Any) -> int:
    """Binaries of a kernel on all devices: the first entry of a device's cache is a dict of them, by specialisation."""
    return sum(len(cache[0]) for cache in kernel.device_caches.values())


def variants(run: Callable[[int], None], counts: Sequence[int]) -> Iterator[Evidence]:
    """Binaries of each kernel after all counts over those after the first; what was compiled before is forgotten (Triton keeps
    it on disk)."""
    every = kernels()
    for kernel in every.values():
        kernel.device_caches.clear()
    run(counts[0])
    before = {name: compiled(kernel) for name, kernel in every.items()}
    for count in counts[1:]:
        run(count)
    parts = {
        name: Part(torch.tensor([compiled(kernel) / before[name]]), torch.ones(1), 0.0)
        for name, kernel in every.items()
        if before[name]
    }
    yield Evidence(f"binaries after {len(counts)} numbers of rows / after one", parts)
