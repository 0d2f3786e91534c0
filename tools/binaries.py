"""Compile a launch ahead of time for a target that is not here, and read from the binary itself what it needs: registers,
stack, spills, shared memory, and instructions for an entry of the vocabulary."""

import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tools.loops import Instruction, main_loop, read_amdgcn, read_sass
from topd_kernels.shared.launch import Launch

KIB = 1 << 10


@dataclass(frozen=True)
class Target:
    """A device to compile for, and the shared memory of one block on it."""

    name: str
    gpu: GPUTarget
    shared_bytes: int


TARGETS = {
    "sm_80": Target("sm_80", GPUTarget("cuda", 80, 32), 163 * KIB),
    "sm_90": Target("sm_90", GPUTarget("cuda", 90, 32), 227 * KIB),
    "sm_100": Target("sm_100", GPUTarget("cuda", 100, 32), 227 * KIB),
    "gfx942": Target("gfx942", GPUTarget("hip", "gfx942", 64), 64 * KIB),
}

_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
    torch.uint8: "u8",
}


@dataclass(frozen=True)
class Binary:
    """One compiled kernel. Stack bytes and spilled registers are a thread's, shared bytes a block's. AMD's scalar registers
    spill into lanes of vector registers, not into memory. Instructions are a thread's for an entry, in the main loop: without
    what the loop can jump over, and with it; None where the kernel does not go over a vocabulary."""

    kernel: str
    variant: str
    target: str
    num_warps: int
    registers: int
    stack_bytes: int
    spills: int
    scalar_spills: int
    shared_bytes: int
    shared_limit_bytes: int
    instructions: float | None = None
    most_instructions: float | None = None

    @property
    def fits(self) -> bool:
        """Tell whether it needs no stack, spills nothing and has the shared memory it needs."""
        return self.stack_bytes == 0 and self.spills == 0 and self.shared_bytes <= self.shared_limit_bytes

    def row(self) -> dict[str, Any]:
        """Return its numbers for JSON."""
        return {**asdict(self), "fits": self.fits}


def _type_of(value: Any, annotated: str) -> str:
    """Return Triton's name of an argument's type."""
    if annotated:
        return annotated
    if isinstance(value, torch.Tensor):
        return "*" + _TYPES[value.dtype]
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def source_of(launch: Launch) -> ASTSource:
    """Return the kernel with the types, constants and alignments with which this launch would call it."""
    signature, constants, attributes = {}, dict(launch.constants), {}
    for i, parameter in enumerate(launch.kernel.params):
        name = parameter.name
        if name in constants:
            signature[name] = "constexpr"
            continue
        value = launch.arguments[name]
        signature[name] = _type_of(value, parameter.annotation_type)
        if isinstance(value, torch.Tensor):
            divisible = not parameter.do_not_specialize_on_alignment and value.data_ptr() % 16 == 0
        else:
            divisible = isinstance(value, int) and not parameter.do_not_specialize and value % 16 == 0
        if divisible:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def variant_of(launch: Launch) -> str:
    """Return the constants and the tensors' types, which tell one binary of a kernel from another."""
    types = "".join(dict.fromkeys(_TYPES[v.dtype] + " " for v in launch.arguments.values() if isinstance(v, torch.Tensor)))
    return f"{types}{' '.join(f'{name}={value}' for name, value in launch.constants.items())}"


def compile_launch(launch: Launch, target: Target) -> Binary:
    """Compile for a target; no device is needed."""
    compiled = triton.compile(source_of(launch), target=target.gpu, options=launch.options)
    (registers, stack, spills, scalar), assembly = (_cuda if target.gpu.backend == "cuda" else _hip)(compiled.asm)
    return Binary(
        launch.name,
        variant_of(launch),
        target.name,
        launch.num_warps,
        registers,
        stack,
        spills,
        scalar,
        compiled.metadata.shared,
        target.shared_bytes,
        *entry_instructions(launch, target.gpu.warp_size, assembly),
    )


def entry_instructions(launch: Launch, warp_size: int, assembly: list[Instruction]) -> tuple[float | None, float | None]:
    """Return a thread's instructions for an entry in the main loop: without what the loop can jump over, and with it. None for
    kernels that do not go through a part of a row block by block."""
    loop = main_loop(assembly) if "block_count" in launch.arguments else None
    if loop is None:
        return None, None
    block, threads = launch.constants["BLOCK"], launch.num_warps * warp_size
    entry_bytes = launch.read_bytes / (launch.grid[0] * launch.arguments["vocab"])
    entries = block * loop.blocks(entry_bytes * block / threads)
    return loop.fewest_slots * threads / entries, loop.slots * threads / entries


def _cuda(asm: dict[str, Any]) -> tuple[tuple[int, int, int, int], list[Instruction]]:
    """Return registers, stack bytes and local bytes of a cubin, and its instructions."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([tools / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    functions = re.findall(r"REG:(\d+) STACK:(\d+)", usage)
    local = re.findall(r"LOCAL:(\d+)", usage)
    assert functions, usage
    needs = max(int(r) for r, _ in functions), max(int(s) for _, s in functions), max(map(int, local), default=0), 0
    return needs, read_sass(code)


def _hip(asm: dict[str, Any]) -> tuple[tuple[int, int, int, int], list[Instruction]]:
    """Return vector registers, private bytes, spilled vector and scalar registers of AMD assembly, and its instructions."""

    def number(name: str) -> int:
        return max(map(int, re.findall(rf"\.{name}:\s+(\d+)", asm["amdgcn"])), default=0)

    spills = number("vgpr_spill_count"), number("sgpr_spill_count")
    return (number("vgpr_count"), number("private_segment_fixed_size"), *spills), read_amdgcn(asm["amdgcn"])
