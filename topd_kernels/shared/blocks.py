"""Block sizes and warps of the kernels, by family of devices.

`default_sizes` is a pure function of what a binary depends on: never of N or V. `python -m topd_bench.gpu --tune`
may find better ones for a device and writes them to `file_of` that device, where `sizes_of` reads them once in a process:

    {"version": 2, "device": "NVIDIA H100 80GB HBM3", "kernels": {"sweep 4 heavy": {"block": 1024, "num_warps": 8}}}

A file with anything else in it is refused. Other sizes add up a row in another order: the last digits of results may move.
"""

import json
import re
from collections.abc import Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

VERSION = 2  # of the kernels that a file was made for: raised when sizes that were good before may no longer be
GENERIC = "sm_90"  # what is described on tensors that are on no GPU, unless a family is given
KERNELS = ("statistics", "sweep", "rest", "gradient", "gather", "scatter")
MOST_BLOCK, MOST_WARPS = 8192, 16


class Sizes(NamedTuple):
    """Entries, or hidden columns, that a program takes at a time, and the warps that work on them."""

    block: int
    num_warps: int


SCALED = Sizes(1024, 4)  # of scaled_rows, on every family: no lane loads fewer than 16 bytes of float32


def lanes_of(family: str) -> int:
    """Return the lanes of a warp: 64 on AMD's data-centre devices, which call it a wave."""
    return 64 if family.startswith("gfx9") else 32


def slow_float64(family: str) -> bool:
    """Tell whether float64 runs at a small fraction of float32's rate, a 32nd or a 64th: on all but the data-centre devices
    that are named here."""
    return family not in ("sm_60", "sm_70", "sm_80", "sm_90", "sm_100") and not family.startswith("gfx9")


def default_sizes(kernel: str, family: str, itemsize: int, *, heavy: bool = False) -> Sizes:
    """Return a kernel's sizes on a family of devices.

    Args:
        kernel: one of KERNELS; rest and gradient are those of logprob_rows.
        family: "sm_90", "gfx942" and so on.
        itemsize: bytes of an entry of what it reads: a tile of products, or a table.
        heavy: scores, or a mixture in float64, which keep more in registers.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(KERNELS)}, got {kernel!r}")
    wide = lanes_of(family) // 32  # as many entries a lane, whatever the width of a warp
    if kernel in ("gather", "scatter"):
        # A lane of a wide wave loads 16 bytes: eight entries of 16 bits, so that fewer warps share the columns.
        return Sizes(1024, 2) if wide == 2 and itemsize == 2 else Sizes(512 * wide, 4)
    if kernel == "gradient":
        return Sizes((2048 if itemsize == 4 else 1024) * wide, 4)
    if kernel in ("statistics", "rest"):  # a lane loads 16 bytes four times a block
        return Sizes((512 if itemsize == 4 else 256) * wide, 1)
    if itemsize == 8 and wide == 2:  # with two entries a lane it runs out of scalar registers
        return Sizes(256, 4)
    widest = (1024 if itemsize == 4 else 512) * wide
    return Sizes(widest // 2 if heavy else widest, 4)


def key_of(kernel: str, itemsize: int, *, heavy: bool = False) -> str:
    """Return the name of an entry of a file."""
    return f"{kernel} {itemsize}{' heavy' if heavy else ''}"


_KEYS = {key_of(kernel, itemsize, heavy=heavy) for kernel in KERNELS for itemsize in (2, 4, 8) for heavy in (False, True)}


def family_of(properties: Any) -> str:
    """Return the family of a device from what torch.cuda.get_device_properties says: "sm_90", "gfx942"."""
    if torch.version.hip:
        return str(properties.gcnArchName).partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def file_of(name: str) -> Path:
    """Return where the sizes of a device of this name are kept, in the user's cache folder."""
    return Path.home() / ".cache" / "topd" / f"blocks-{VERSION}-{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}.json"


def read(path: Path, name: str) -> dict[str, Sizes]:
    """Return the sizes in a device's file; none where there is no file.

    Raises:
        ValueError: it holds anything else than sizes of kernels for that device.
    """

    def refuse(rule: str) -> ValueError:
        return ValueError(f"{path} must {rule}; remove it, and python -m topd_bench.gpu --tune writes another")

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise refuse(f"be JSON, got {error}") from None
    if not isinstance(content, dict) or set(content) != {"version", "device", "kernels"}:
        raise refuse("hold version, device and kernels, and nothing else")
    if content["version"] != VERSION or content["device"] != name:
        raise refuse(f"be of version {VERSION} for {name}, got {content['version']!r} for {content['device']!r}")
    if not isinstance(content["kernels"], dict):
        raise refuse(f"hold an object of kernels, got {content['kernels']!r}")
    sizes = {}
    for key, entry in content["kernels"].items():
        if key not in _KEYS:
            raise refuse(f"name kernels as {min(_KEYS)!r} is, got {key!r}")
        if not isinstance(entry, dict) or set(entry) != {"block", "num_warps"}:
            raise refuse(f"give {key!r} a block and num_warps, and nothing else, got {entry!r}")
        for field, least, most in (("block", 32, MOST_BLOCK), ("num_warps", 1, MOST_WARPS)):
            value = entry[field]
            if type(value) is not int or not least <= value <= most or value & (value - 1):
                raise refuse(f"give {key!r} a power of two from {least} to {most} as {field}, got {value!r}")
        sizes[key] = Sizes(entry["block"], entry["num_warps"])
    return sizes


def content_of(name: str, sizes: Mapping[str, Sizes]) -> dict[str, Any]:
    """Return what a device's file holds."""
    return {"version": VERSION, "device": name, "kernels": {key: size._asdict() for key, size in sorted(sizes.items())}}


class Device(NamedTuple):
    """What the launchers know of a device: its family, and the sizes of the user's file, which go before the family's."""

    family: str
    own: Mapping[str, Sizes] = {}

    def sizes(self, kernel: str, itemsize: int, *, heavy: bool = False) -> Sizes:
        """Return a kernel's sizes; the arguments are those of `default_sizes`."""
        own = self.own.get(key_of(kernel, itemsize, heavy=heavy)) if self.own else None
        return own or default_sizes(kernel, self.family, itemsize, heavy=heavy)


def described(device: torch.device) -> str:
    """Return a GPU's family, and whether its sizes are the family's or those of the user's file, in words."""
    chosen, name = device_of(device), torch.cuda.get_device_properties(device).name
    if not chosen.own:
        return f"those of {chosen.family}"
    return f"those of {chosen.family}, and of {file_of(name)}: {', '.join(chosen.own)}"


@cache
def _of_index(index: int) -> Device:
    """Return a GPU of this process; its file is read once."""
    properties = torch.cuda.get_device_properties(index)
    try:
        path = file_of(properties.name)
    except RuntimeError:  # a user without a home
        return Device(family_of(properties))
    return Device(family_of(properties), read(path, properties.name))


@lru_cache
def _described(family: str) -> Device:
    return Device(family)


def device_of(device: torch.device, family: str | None = None) -> Device:
    """Return what the launchers know of a tensor's device. `family`: another one, which is not here, without a file."""
    if family is not None or device.type != "cuda":
        return _described(family or GENERIC)
    return _of_index(torch.cuda.current_device() if device.index is None else device.index)
