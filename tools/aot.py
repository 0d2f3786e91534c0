"""Compile the Triton kernels for devices that are not here and read what the binaries need: python -m tools.aot

    python -m tools.aot                             the default variants, all four targets
    python -m tools.aot --all --json out.json       every variant that a launcher can choose
    python -m tools.aot --targets sm_90 gfx942      some targets
    python -m tools.aot --all --kernels transport   some kernels

"instructions an entry" are a thread's in the main loop, as tools/loops.py counts them; on AMD's devices those of the vector
units, in brackets with what the loop can jump over. A dash: the kernel does not go over a vocabulary.

Exits with 1 where a kernel uses the stack, spills, or needs more shared memory than a block has.
"""

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import groupby
from pathlib import Path

import triton

from tools.binaries import TARGETS, Binary, compile_launch
from tools.variants import all_launches, default_launches, distinct
from topd_bench.report import markdown_table, note, write_json
from topd_kernels.shared.launch import Launch


@cache
def _variants(every: bool, kernels: tuple[str, ...], target: str) -> list[Launch]:
    """Return the launches to compile, of this process: they hold tensors and kernels, which do not travel between processes.
    Their block sizes are those of the target's family, whose name it bears."""
    variants = distinct(all_launches(target) if every else default_launches(target))
    return [launch for launch in variants if not kernels or launch.name in kernels]


def _compile(task: tuple[bool, tuple[str, ...], int, str]) -> Binary:
    """Compile one variant, by its number, for one target."""
    every, kernels, index, target = task
    return compile_launch(_variants(every, kernels, target)[index], TARGETS[target])


def table(binaries: list[Binary]) -> str:
    """Return a line for each kernel and target: how many variants, and the most that any of them needs."""
    rows = []
    ordered = sorted(binaries, key=lambda b: (b.kernel, list(TARGETS).index(b.target)))
    for (kernel, target), group in groupby(ordered, key=lambda b: (b.kernel, b.target)):
        variants = list(group)
        registers = [b.registers for b in variants]
        most = [str(max(getattr(b, name) for b in variants)) for name in ("stack_bytes", "spills", "shared_bytes")]
        span = f"{min(registers)} to {max(registers)}"
        fits = "yes" if all(b.fits for b in variants) else "NO"
        rows.append([kernel, target, str(len(variants)), span, *most, _instructions(variants), fits])
    heads = ["kernel", "target", "variants", "registers", "stack, B", "spills", "shared, B", "instructions an entry", "fits"]
    return markdown_table(heads, rows)


def _instructions(variants: list[Binary]) -> str:
    """Return the least and the most instructions an entry of a kernel's variants; what a loop can jump over in brackets."""
    counts = [(b.instructions, b.most_instructions or 0.0) for b in variants if b.instructions is not None]
    if not counts:
        return "-"
    fewest, most = zip(*counts, strict=True)
    span = f"{min(fewest):.1f} to {max(fewest):.1f}"
    return span if fewest == most else f"{span} ({max(most):.1f})"


def compiled(targets: list[str], *, every: bool = False, kernels: tuple[str, ...] = (), jobs: int = 2) -> list[Binary]:
    """Compile variants for targets, in so many processes; none where `kernels` are not those of this package."""
    tasks = [(every, kernels, i, target) for target in targets for i in range(len(_variants(every, kernels, target)))]
    binaries = []
    with ProcessPoolExecutor(jobs) as pool:
        for done, binary in enumerate(pool.map(_compile, tasks, chunksize=4), 1):
            binaries.append(binary)
            if done % 50 == 0:
                note(f"{done} of {len(tasks)}")
    return binaries


def main() -> int:
    """Compile, print the table, return 1 where a binary does not fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--all", action="store_true", help="every variant that a launcher can choose, not the default ones")
    parser.add_argument("--kernels", nargs="+", default=(), metavar="NAME", help="these alone")
    parser.add_argument("--json", type=Path, help="write every binary's numbers here")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    options = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: interpreted kernels have no binaries; unset it")
    binaries = compiled(options.targets, every=options.all, kernels=tuple(options.kernels), jobs=options.jobs)
    if not binaries:
        parser.error(f"--kernels must name kernels, got {' '.join(options.kernels)}; without it the table names them all")
    print(f"Triton {triton.__version__}, compiled ahead of time, no device; {len(binaries)} binaries\n")
    print(table(binaries))
    for binary in binaries:
        if not binary.fits:
            print(f"does not fit: {binary}")
    if options.json:
        write_json(options.json, [binary.row() for binary in binaries])
    return 0 if all(binary.fits for binary in binaries) else 1


if __name__ == "__main__":
    sys.exit(main())
