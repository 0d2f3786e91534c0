"""topd::transport in Triton: m optimal-transport problems, one program a problem, one launch.

Windows up to 64: costs and plan in registers (tile.py). Up to 128: in scratch, 256 KiB a program, through registers by panels
of columns (panels.py); a program takes one problem after the other, so that the scratch of all that run at a time, 33 MiB on
132 multiprocessors, stays in an L2 of that size.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from topd_kernels.shared.blocks import device_of, slow_float64
from topd_kernels.shared.launch import Launch, bytes_of, cdiv, processors, run_all
from topd_kernels.transport.costs import COSTS
from topd_kernels.transport.kernels import transport as transport_tile
from topd_kernels.transport.kernels import transport_panels

__all__ = ["COSTS", "Outputs", "launches", "transport"]

MAX_WINDOW = 128
LARGEST_TILE = 64  # rows and columns of costs that registers hold in float64
PANEL = 16  # columns of 128 rows that leave a thread some 40 of its registers
PIECE = 4  # entries of a table's row at a time
# How often a cost reads the tables' rows: the cosine once for their norms, and once more for their size where compensated.
READS = {"cosine": 2, "sqeuclidean": 1, "mismatch": 0}


def block_of(window: int) -> int:
    """Return the entries that a program holds of a window of this many."""
    if not 1 <= window <= MAX_WINDOW:
        raise ValueError(f"windows must hold 1 to {MAX_WINDOW} tokens on a GPU, got {window}")
    return max(16, 1 << (window - 1).bit_length())


def warps_of(block: int) -> int:
    """Return a program's warps: sixteen entries of the largest tile or panel a thread, which leaves its float64 numbers in
    registers."""
    return max(2, min(block, LARGEST_TILE) ** 2 // 512)


class Outputs(NamedTuple):
    """distance [m], plan [m, K_S, K_T], marginal_error [m]; float64 where a table is, else float32."""

    distance: Tensor
    plan: Tensor
    marginal_error: Tensor


def launches(
    student_table: Tensor,
    student_ids: Tensor,
    student_lengths: Tensor,
    teacher_table: Tensor,
    teacher_ids: Tensor,
    teacher_lengths: Tensor,
    cost: str,
    epsilon: float,
    max_iterations: int,
    tolerance: float,
    *,
    family: str | None = None,
) -> tuple[list[Launch], Outputs]:
    """Return the launch, and what it will have written. `family`: of devices, where it is not the tensors' own. Where float64
    is slow on it, and the tables are narrower, costs add up in two float32 each."""
    if cost not in COSTS:
        raise ValueError(f"cost must be one of {', '.join(COSTS)}, got {cost!r}")
    (problems, student_window), teacher_window = student_ids.shape, teacher_ids.shape[1]
    block = block_of(max(student_window, teacher_window))
    student_table, teacher_table = (x if x.stride(1) == 1 else x.contiguous() for x in (student_table, teacher_table))
    dtype = torch.promote_types(torch.promote_types(student_table.dtype, teacher_table.dtype), torch.float32)
    new = student_table.new_empty
    outputs = Outputs(
        new(problems, dtype=dtype), new(problems, student_window, teacher_window, dtype=dtype), new(problems, dtype=dtype)
    )
    arguments = {
        "StudentTable": student_table,
        "StudentIds": student_ids.contiguous(),
        "StudentLengths": student_lengths.contiguous(),
        "TeacherTable": teacher_table,
        "TeacherIds": teacher_ids.contiguous(),
        "TeacherLengths": teacher_lengths.contiguous(),
        "Distance": outputs.distance,
        "Plan": outputs.plan,
        "MarginalError": outputs.marginal_error,
        "student_window": student_window,
        "teacher_window": teacher_window,
        "width": student_table.shape[1],
        "student_stride": student_table.stride(0),
        "teacher_stride": teacher_table.stride(0),
        "epsilon": epsilon,
        "max_iterations": max_iterations,
        "tolerance": tolerance,
    }
    compensated = dtype == torch.float32 and slow_float64(device_of(student_table.device, family).family)
    sizes = {"ROWS": block, "COLUMNS": block, "PIECE": PIECE}
    constants = {"COST": COSTS.index(cost), **sizes, "COMPENSATED": compensated}
    make = _by_panels if block > LARGEST_TILE else _in_registers
    return [make(arguments, constants, cost, outputs)], outputs


def _in_registers(arguments: dict[str, Any], constants: dict[str, int], cost: str, outputs: Outputs) -> Launch:
    """Return the launch that takes a problem a program."""
    block, reads = constants["ROWS"], _reads(cost, constants)
    return Launch(
        transport_tile,
        (outputs.distance.shape[0],),
        arguments,
        constants,
        warps_of(block),
        255,
        read_bytes=_window_bytes(arguments) + _table_bytes(arguments, student=reads, teacher=reads),
        written_bytes=bytes_of(*outputs),
    )


def _by_panels(arguments: dict[str, Any], constants: dict[str, int], cost: str, outputs: Outputs) -> Launch:
    """Return the launch whose programs take one problem after the other. Its scratch is not among the bytes: it stays in cache,
    and how often it is read depends on the iterations."""
    block, problems = constants["ROWS"], outputs.distance.shape[0]
    programs, panels = min(problems, processors(outputs.plan)), cdiv(arguments["teacher_window"], PANEL)
    scratch = outputs.plan.new_empty(programs, 2, block, block, dtype=torch.float64)
    reads = _reads(cost, constants)
    tables = _table_bytes(arguments, student=reads and reads - 1 + panels, teacher=reads)
    return Launch(
        transport_panels,
        (programs,),
        {**arguments, "Scratch": scratch, "problems": problems},
        {**constants, "PANEL": PANEL},
        warps_of(block),
        255,
        read_bytes=_window_bytes(arguments) + panels * bytes_of(arguments["TeacherLengths"]) + tables,
        written_bytes=bytes_of(*outputs),
    )


def _reads(cost: str, constants: dict[str, int]) -> int:
    """Return how often the tables' rows are read."""
    return READS[cost] + (cost == "cosine" and constants["COMPENSATED"])


def _window_bytes(arguments: dict[str, Any]) -> int:
    """Return the bytes of both sides' ids and lengths."""
    return bytes_of(*(arguments[name] for name in ("StudentIds", "StudentLengths", "TeacherIds", "TeacherLengths")))


def _table_bytes(arguments: dict[str, Any], *, student: int, teacher: int) -> int:
    """Return the bytes of the tables' rows, read so many times each."""
    rows = student * arguments["StudentIds"].numel() * arguments["StudentTable"].itemsize
    rows += teacher * arguments["TeacherIds"].numel() * arguments["TeacherTable"].itemsize
    return int(rows * arguments["width"])


def transport(
    student_table: Tensor,
    student_ids: Tensor,
    student_lengths: Tensor,
    teacher_table: Tensor,
    teacher_ids: Tensor,
    teacher_lengths: Tensor,
    cost: str,
    epsilon: float,
    max_iterations: int,
    tolerance: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the op `topd::transport`."""
    student, teacher = (student_table, student_ids, student_lengths), (teacher_table, teacher_ids, teacher_lengths)
    order, outputs = launches(*student, *teacher, cost, epsilon, max_iterations, tolerance)
    run_all(order)
    return outputs
