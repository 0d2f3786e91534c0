"""Count the instructions of a kernel's main loop in what the compiler wrote: SASS of NVIDIA's devices, assembly of AMD's.

A loop is what a way leads around in, in whatever order its blocks stand. The main loop is, among the loops that hold no other,
the one that loads most from memory, and of several the one with least instructions: what a loop over a vocabulary does to a
whole block of entries. A loop beside it, with masks, does what is left of a row, and rows with entries of probability 0. A loop
around it, as where a block's largest entry starts sums anew, is left out. Where the compiler peeled blocks off, that is still
the loop; where it unrolled the loop, an iteration takes several blocks, as many as its loads fetch the bytes of.

Two numbers: every instruction of the loop, and those of the shortest way through it, which leaves out what a branch can jump
over. They are the same where the loop has no branches. AMD's assembly jumps over what no lane is left for, which in all but a
row's last block is nothing: `s_cbranch_execz` counts as never taken, `s_cbranch_execnz` as always.
"""

import math
import re
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import NamedTuple


@dataclass(frozen=True)
class Instruction:
    """One instruction: the labels that stand before it, where it may branch to, whether it never goes on, how many issue slots
    it takes, and the bytes that a thread loads from memory with it."""

    labels: tuple[str, ...]
    target: str | None
    always: bool
    slots: int
    loaded_bytes: int


class Loop(NamedTuple):
    """An innermost loop: the slots of all its instructions, and of the shortest way through, with the bytes that they load."""

    slots: int
    fewest_slots: int
    loaded_bytes: int
    fewest_loaded_bytes: int

    def blocks(self, block_bytes: float) -> int:
        """Return how many blocks an iteration takes; `block_bytes`: what a thread loads for one."""
        return max(1, round((self.fewest_loaded_bytes or self.loaded_bytes) / block_bytes))


_SASS = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?);")
_SASS_WIDTH = re.compile(r"\.(?:[US]?(8|16|64|128))\b")
_AMD_WIDTHS = {
    "ubyte": 1,
    "sbyte": 1,
    "ushort": 2,
    "sshort": 2,
    "short": 2,
    "dword": 4,
    "dwordx2": 8,
    "dwordx3": 12,
    "dwordx4": 16,
}


def read_sass(text: str) -> list[Instruction]:
    """Return the instructions of `nvdisasm -c`; each takes a slot of a scheduler."""
    instructions, labels = [], []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L\w+):", line):
            labels.append(label[1])
        elif parts := _SASS.search(line):
            predicate, name, operands = parts.groups()
            branch = re.search(r"`\((\.L\w+)\)", operands) if name.split(".")[0] == "BRA" else None
            always = not predicate and (name == "EXIT" or (branch is not None and operands.startswith("`")))
            width = _SASS_WIDTH.search(name)
            loaded = (int(width[1]) // 8 if width else 4) if re.match(r"LDG(STS)?\b", name) else 0
            instructions.append(Instruction(tuple(labels), branch and branch[1], always, 1, loaded))
            labels = []
    return instructions


def read_amdgcn(text: str) -> list[Instruction]:
    """Return the instructions of AMD's assembly. Those of the vector units take a slot of a SIMD; scalar ones and
    those of memory are issued beside them."""
    instructions, labels = [], []
    for line in text.splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            labels.append(label[1])
        elif parts := re.match(r"\s+((?:v|s|global|buffer|flat|scratch|ds)_\w+)\s*([^;]*)", line):
            name, operands = parts[1], parts[2].strip()
            jumps = name.startswith(("s_cbranch", "s_branch")) and name != "s_cbranch_execz"
            load = re.match(r"(?:global|buffer|flat)_load_([a-z]+\d?)", name)
            loaded = _AMD_WIDTHS.get(load[1], 0) if load else 0
            always = name in ("s_branch", "s_cbranch_execnz", "s_endpgm")
            instructions.append(
                Instruction(tuple(labels), operands if jumps else None, always, int(name.startswith("v_")), loaded)
            )
            labels = []
    return instructions


def main_loop(instructions: list[Instruction]) -> Loop | None:
    """Return the main loop; None where nothing branches back but an instruction to itself, which follows every kernel's end."""
    after = _successors(instructions)
    before: list[list[int]] = [[] for _ in instructions]
    for i, successors in enumerate(after):
        for successor in successors:
            before[successor].append(i)
    innermost = _innermost(after, before, _reached(after, 0, set(range(len(instructions)))))
    loops = [_loop(instructions, after, start, body) for start, body in innermost]
    return max(loops, key=lambda loop: (loop.loaded_bytes, -loop.slots), default=None)


def _successors(instructions: list[Instruction]) -> list[list[int]]:
    """Return where each instruction may go on."""
    place = {label: i for i, instruction in enumerate(instructions) for label in instruction.labels}
    successors = []
    for i, instruction in enumerate(instructions):
        after = [] if instruction.always or i + 1 == len(instructions) else [i + 1]
        if instruction.target in place:
            after.append(place[instruction.target])
        successors.append(after)
    return successors


def _reached(ways: list[list[int]], start: int, within: set[int]) -> set[int]:
    """Return the instructions that ways lead to from start."""
    reached = {start} & within
    queue = list(reached)
    while queue:
        new = within.intersection(ways[queue.pop()]) - reached
        reached |= new
        queue += new
    return reached


def _innermost(after: list[list[int]], before: list[list[int]], within: set[int]) -> list[tuple[int, set[int]]]:
    """Return the loops that hold no other: where each is entered, and its instructions. A loop is what a way leads around in;
    without the instruction where it is entered, those inside it are left."""
    loops = []
    left = {i for i in within if any(j != i - 1 for j in before[i])}  # what a branch leads to: a loop has one at least
    while left:
        seed = min(left)
        around = _reached(after, seed, within) & _reached(before, seed, within)
        left -= around
        if len(around) > 1:
            entry = min((i for i in around if not around.issuperset(before[i])), default=min(around))
            loops += _innermost(after, before, around - {entry}) or [(entry, around)]
    return loops


def _loop(instructions: list[Instruction], after: list[list[int]], start: int, body: set[int]) -> Loop:
    """Return the numbers of a loop."""
    # The fewest slots with which each instruction is reached, and the bytes loaded on that way.
    ways: dict[int, tuple[int, int]] = {start: (0, 0)}
    queue, around = [(0, 0, start)], []
    while queue:
        slots, loaded, i = heappop(queue)
        if (slots, loaded) > ways[i]:
            continue
        way = slots + instructions[i].slots, loaded + instructions[i].loaded_bytes
        for successor in after[i]:
            if successor == start:
                around.append(way)
            elif successor in body and way < ways.get(successor, (math.inf, math.inf)):
                ways[successor] = way
                heappush(queue, (*way, successor))
    fewest, inside = min(around), [instructions[i] for i in body]
    return Loop(sum(each.slots for each in inside), fewest[0], sum(each.loaded_bytes for each in inside), fewest[1])
