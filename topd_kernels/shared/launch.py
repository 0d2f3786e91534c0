"""A kernel with everything that one launch of it needs, held apart from running it: the same description is run on a device,
compiled for a target that is not here, and looked at by the static account.

Launchers return a list of these; what they choose among (block sizes, constants) is therefore what `python -m tools.aot`
compiles.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

MAX_GRID_YZ = 65_535


class Launch(NamedTuple):
    """`arguments` are the kernel's runtime arguments by name, `constants` its constexprs. `registers`: how many a thread may
    have on NVIDIA; ptxas, left alone, may rather spill some, so that two blocks fit onto a multiprocessor."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int = 4
    registers: int | None = None

    @classmethod
    def of(
        cls,
        kernel: Any,
        grid: tuple[int, ...],
        arguments: dict[str, Any],
        constants: dict[str, Any],
        num_warps: int,
        registers: int | None = None,
    ) -> "Launch":
        """With those arguments and constants that the kernel knows."""
        known = ({name: each[name] for name in kernel.arg_names if name in each} for each in (arguments, constants))
        return cls(kernel, grid, *known, num_warps, registers)

    @property
    def name(self) -> str:
        return str(self.kernel.__name__).strip("_")

    @property
    def options(self) -> dict[str, Any]:
        options = {"num_warps": self.num_warps, "enable_fp_fusion": True}
        return options if self.registers is None or torch.version.hip else {**options, "maxnreg": self.registers}

    def run(self) -> None:
        """Launch on the device of the arguments; on CPU tensors only through Triton's interpreter."""
        if any(size > MAX_GRID_YZ for size in self.grid[1:]):
            raise ValueError(f"grid of {self.name} must not pass {MAX_GRID_YZ} in y or z, got {self.grid}")
        if 0 not in self.grid:
            self.kernel[self.grid](**self.arguments, **self.constants, **self.options)


def run_all(launches: list[Launch]) -> None:
    for launch in launches:
        launch.run()


def interpreted(kernel: Any) -> bool:
    """Whether TRITON_INTERPRET was set when this kernel was defined."""
    return isinstance(kernel, InterpretedFunction)


def processors(like: Tensor) -> int:
    """Multiprocessors of the device of `like`; 1 on a CPU, where programs run one after another."""
    return torch.cuda.get_device_properties(like.device).multi_processor_count if like.device.type == "cuda" else 1


def splits_of(rows: int, blocks: int, multiprocessors: int) -> int:
    """Programs that share a row's vocabulary: enough for four programs a multiprocessor, each with four blocks at least."""
    wanted = triton.cdiv(4 * multiprocessors, max(1, rows))
    return max(1, min(wanted, blocks // 4, 64))
