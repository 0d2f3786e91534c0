"""A thread's instructions for an entry, of every kernel that goes over a vocabulary: python -m tools.instructions

    python -m tools.instructions                      compile, compare with topd/costs/instructions.json, print both
    python -m tools.instructions --targets sm_90      one target
    python -m tools.instructions --write              write topd/costs/instructions.json anew

Exits with 1 where a count is more than 2 % above the file's. The account (`python -m tools.account`) reads the file, and
compiles nothing; `python -m tools.gpu_doc` writes it, and docs/gpu.md with it. Counts belong to a version of Triton, which the
file names; under another one there is nothing to compare.
"""

import argparse
import json
import sys
from functools import cache
from typing import Any

import torch
import triton

from tools.binaries import TARGETS, compile_launch
from topd.costs import predicted
from topd_bench.report import markdown_table, write_json
from topd_kernels.divergence_rows import launches as divergence_rows
from topd_kernels.logprob_rows import launches as logprob_rows
from topd_kernels.shared.launch import Launch

FILE = predicted.INSTRUCTIONS
TOLERANCE = 1.02
PARAMETERS = {"reverse_kl": 0.0, "forward_kl": float("inf"), "jsd": 0.5}
LOGPROBS = {"logprobs": False, "logprobs with entropy": True}
# Of a row whose entries are aligned, as the binaries of `python -m tools.aot` are.
ROWS, VOCAB = 4, 64_000


def divergence_launches(divergence: str, rows: int, vocab: int, family: str) -> list[Launch]:
    """Return a chunk's launches with gradients on a family of devices: float32 tiles, the gradient in 16 bits."""
    student, teacher = (torch.empty(rows, vocab, device="meta") for _ in range(2))
    grad = torch.empty(rows, vocab, dtype=torch.bfloat16, device="meta")
    spec = divergence_rows.Spec(1.0, None, 1.0, None, 1.0, divergence, PARAMETERS[divergence], hard_weight=0.0)
    return divergence_rows.launches(student, teacher, None, None, None, spec, grad, scores=False, family=family)[0]


def logprob_launches(entropy: bool, rows: int, vocab: int, family: str) -> list[Launch]:
    """Return a chunk's launches with gradients on a family of devices, of one id a row."""
    product, ids = torch.empty(rows, vocab, device="meta"), torch.empty(rows, 1, dtype=torch.int64, device="meta")
    grad, second = (torch.empty(rows, vocab, dtype=torch.bfloat16, device="meta") for _ in range(2))
    spec = logprob_rows.Spec(1.0, None, 1.0)
    return logprob_rows.launches(product, None, ids, spec, second if entropy else None, grad, entropy, family=family)[0]


def over_vocabulary(launches: list[Launch]) -> list[Launch]:
    """Return the launches of kernels that go through a part of a row block by block."""
    return [launch for launch in launches if "block_count" in launch.arguments]


def counted(target: str) -> dict[str, Launch]:
    """Return the launches that are counted on a target, which is a family too, by what they belong to, their place in it and
    the kernel: "jsd 2 sweep"."""
    by_loss = {name: divergence_launches(name, ROWS, VOCAB, target) for name in PARAMETERS}
    by_loss |= {name: logprob_launches(entropy, ROWS, VOCAB, target) for name, entropy in LOGPROBS.items()}
    return {
        f"{loss} {i} {launch.name}": launch
        for loss, launches in by_loss.items()
        for i, launch in enumerate(over_vocabulary(launches), 1)
    }


@cache
def held() -> dict[str, Any]:
    """Return the file: Triton's version, and {launch: {target: instructions}}."""
    contents: dict[str, Any] = json.loads(FILE.read_text())
    return contents


def instructions_of(divergence: str, target: str, launches: list[Launch]) -> list[float]:
    """Return the file's count for each of a chunk's launches, 0 for those that do not go over a vocabulary.

    Raises:
        KeyError: the file does not know a launch.
    """
    counts = iter(f"{divergence} {i} {launch.name}" for i, launch in enumerate(over_vocabulary(launches), 1))
    return [held()["instructions"][next(counts)][target] if "block_count" in each.arguments else 0.0 for each in launches]


def compiled(targets: list[str]) -> dict[str, dict[str, float]]:
    """Return {launch: {target: instructions}} of what the compiler makes of the kernels now."""
    counts: dict[str, dict[str, float]] = {}
    for target in targets:
        for name, launch in counted(target).items():
            instructions = compile_launch(launch, TARGETS[target]).instructions or 0.0
            counts.setdefault(name, {})[target] = round(instructions, 1)
    return counts


def risen(counts: dict[str, dict[str, float]]) -> list[str]:
    """Return a line for each count that is above the file's by more than the tolerance, or that the file does not have."""
    lines = []
    for name, by_target in counts.items():
        for target, count in by_target.items():
            before = held()["instructions"].get(name, {}).get(target)
            if before is None or count > TOLERANCE * before:
                lines.append(f"{name} on {target}: {count} instructions an entry, {FILE.name} has {before}")
    return lines


def write(counts: dict[str, dict[str, float]]) -> None:
    """Write the file anew."""
    write_json(FILE, {"triton": triton.__version__, "instructions": counts})
    held.cache_clear()


def main() -> int:
    """Compile and compare, or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--write", action="store_true", help="write the file anew, for all targets")
    options = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: interpreted kernels have no binaries; unset it")
    targets = list(TARGETS) if options.write else options.targets
    counts = compiled(targets)
    if options.write:
        write(counts)
    rows = [[name, *(str(by_target[target]) for target in targets)] for name, by_target in counts.items()]
    print(f"Instructions of a thread for an entry, Triton {triton.__version__}\n")
    print(markdown_table(["launch", *targets], rows))
    if triton.__version__ != held()["triton"]:
        print(f"{FILE.name} is of Triton {held()['triton']}: not compared")
        return 0
    for line in risen(counts):
        print(line)
    return 1 if risen(counts) else 0


if __name__ == "__main__":
    sys.exit(main())
