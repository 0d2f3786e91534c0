"""A kernel with everything that one launch of it needs, held apart from running it: the same description is run on a device,
compiled for a target that is not here (`python -m tools.aot`), watched in the interpreter (`tools/watched.py`) and counted by
the static account (`python -m tools.account`).

Launchers return a list of these; what is checked is therefore what runs.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

MAX_GRID_YZ = 65_535
# Of the kernels that read a row, whose programs are of one warp where they need a number of a whole row.
ROW_PROGRAMS_PER_PROCESSOR = 32


@dataclass
class Launch:
    """One launch of a kernel.

    Attributes:
        kernel: the @triton.jit function.
        grid: its programs, in one to three dimensions.
        arguments: its runtime arguments, by the names of its parameters.
        constants: its constexprs, by the names of its parameters.
        num_warps: warps of a program.
        registers: how many a thread may have on NVIDIA; ptxas, left alone, may rather spill some, so that two blocks fit onto a
            multiprocessor.
        read_bytes, written_bytes: what its loads and stores touch, from cache or memory. Where that depends on the data: as if
            every token and id were in the vocabulary, no id came twice, no weight were 0, every window full, every logit finite
            and a row's largest entry in its first block.

    Raises:
        TypeError: a parameter is missing or set twice, or a name is none of the kernel's parameters.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int
    registers: int | None = None
    read_bytes: int = 0
    written_bytes: int = 0

    def __post_init__(self) -> None:
        names, arguments, constants = self.kernel.arg_names, self.arguments.keys(), self.constants.keys()
        if len(arguments) + len(constants) == len(names) and not set(names).difference(arguments, constants):
            return
        if unknown := sorted((arguments | constants).difference(names)):
            raise TypeError(f"{self.name} has no parameter {', '.join(unknown)}; it has {', '.join(names)}")
        if missing := sorted(set(names).difference(arguments, constants)):
            raise TypeError(f"a launch of {self.name} must set {', '.join(missing)}")
        raise TypeError(f"a launch of {self.name} sets {', '.join(sorted(arguments & constants))} twice")

    @property
    def name(self) -> str:
        """Return the kernel's name."""
        return str(self.kernel.__name__)

    @property
    def moved_bytes(self) -> int:
        """Return the bytes that are read and written."""
        return self.read_bytes + self.written_bytes

    @property
    def options(self) -> dict[str, Any]:
        """Return what Triton is told beside the kernel's parameters."""
        options = {"num_warps": self.num_warps, "enable_fp_fusion": True}
        return options if self.registers is None or torch.version.hip else {**options, "maxnreg": self.registers}

    @property
    def device(self) -> torch.device:
        """Return the device of the arguments.

        Raises:
            ValueError: they are on several.
        """
        tensors = ((name, value.device) for name, value in self.arguments.items() if isinstance(value, Tensor))
        first, device = next(tensors)
        for name, other in tensors:
            if other != device:
                raise ValueError(f"{name} of {self.name} must be on {device} as {first} is, got {other}; move it there")
        return device

    def run(self) -> None:
        """Launch on the device of the arguments, whichever is current, and on its current stream; on CPU tensors only through
        Triton's interpreter."""
        if any(size > MAX_GRID_YZ for size in self.grid[1:]):
            raise ValueError(f"grid of {self.name} must not pass {MAX_GRID_YZ} in y or z, got {self.grid}")
        if 0 in self.grid:
            return
        device = self.device
        # Triton launches on the current device's stream, where a pointer of another device is read as one of its own.
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self.kernel[self.grid](**self.arguments, **self.constants, **self.options)


def run_all(launches: list[Launch]) -> None:
    """Run launches in order."""
    for launch in launches:
        launch.run()


def interpreted(kernel: Any) -> bool:
    """Tell whether TRITON_INTERPRET was set when this kernel was defined."""
    return isinstance(kernel, InterpretedFunction)


def processors(like: Tensor) -> int:
    """Return the multiprocessors of the device of `like`; 1 on a CPU, where programs run one after another."""
    return torch.cuda.get_device_properties(like.device).multi_processor_count if like.device.type == "cuda" else 1


def cdiv(count: int, size: int) -> int:
    """Return how many blocks of `size` hold `count`."""
    return -(-count // size)


def splits_of_rows(rows: int, blocks: int, multiprocessors: int) -> int:
    """Return how many programs ("splits") share a row's vocabulary of so many blocks: enough of them to fill the device, but
    each with four blocks at least, and 64 at most."""
    return max(1, min(cdiv(ROW_PROGRAMS_PER_PROCESSOR * multiprocessors, max(1, rows)), blocks // 4, 64))


def logit_numbers(scale: float, softcap: float | None, temperature: float) -> tuple[float, float]:
    """Return `inner` and `outer` of row_math.logits_of; outer is 0 where there is no softcap."""
    if softcap is None:
        return scale / temperature, 0.0
    return scale / softcap, softcap / temperature


def bytes_of(*tensors: Tensor) -> int:
    """Return the bytes of tensors, each entry once."""
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)
