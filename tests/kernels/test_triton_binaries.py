"""Compiled ahead of time: the default variants fit their devices, and ten different N need one binary of each kernel.

Interpreted kernels have no binaries, so these run in processes of their own, without TRITON_INTERPRET.
"""

import os
import subprocess
import sys

import pytest

from tools import instructions
from tools.binaries import TARGETS, Binary

ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def python(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-W", "ignore", *arguments]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)


def test_default_variants_fit_without_stack_and_spills():
    done = python("-m", "tools.aot", "--targets", "sm_90", "gfx942")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")][2:]
    kernels = {line.split("|")[1].strip() for line in lines}
    assert {"statistics", "sweep", "rest", "gradient", "gather", "scatter", "add_segments"} <= kernels
    assert all(line.split("|")[-2].strip() == "yes" for line in lines)


ODD_ROWS = """
import torch
from tools.binaries import TARGETS, compile_launch
from topd_kernels.divergence_rows import launches as d
cases = [
    ("sm_80", torch.float32, torch.float32, ("forward_kl", 0.05), False),
    ("sm_100", torch.float32, torch.bfloat16, ("forward_kl", float("inf")), False),
    ("gfx942", torch.float64, torch.float64, ("forward_kl", float("inf")), False),
    ("gfx942", torch.float64, torch.float64, ("reverse_kl", 0.0), True),
]
for target, dtype, grad, divergence, scores in cases:
    student, teacher = torch.empty(4, 64_001, dtype=dtype), torch.empty(4, 64_001, dtype=dtype)
    spec, tile = d.Spec(1.0, None, 1.0, None, 1.0, *divergence, 0.0), torch.empty(4, 64_001, dtype=grad)
    for launch in d.launches(student, teacher, None, None, None, spec, tile, scores, family=target)[0]:
        binary = compile_launch(launch, TARGETS[target])
        if not binary.fits:
            print(binary)
"""


def test_rows_that_are_not_aligned_fit_without_stack():
    """Seven such sweeps took 8 bytes of stack on NVIDIA's devices, or 20 on AMD's."""
    done = python("-c", ODD_ROWS)
    assert done.stdout == "", done.stdout
    assert done.returncode == 0, done.stderr


SPILLING = """
from dataclasses import replace
from tools.aot import table
from tools.binaries import TARGETS, compile_launch
from tools.variants import default_launches
sweep = next(launch for launch in default_launches() if launch.name == "sweep")
wide = replace(sweep, constants={**sweep.constants, "BLOCK": 4096}, num_warps=1)
binary = compile_launch(wide, TARGETS["sm_90"])
print(binary.fits, binary.stack_bytes > 0)
"""


def test_a_kernel_that_needs_the_stack_is_found():
    done = python("-c", SPILLING)
    assert done.stdout == "False True\n", done.stderr


@pytest.mark.parametrize(
    ("wrong", "fits"), [({}, True), ({"stack_bytes": 8}, False), ({"spills": 1}, False), ({"shared_bytes": 101}, False)]
)
def test_what_fits(wrong, fits):
    numbers = {"registers": 64, "stack_bytes": 0, "spills": 0, "scalar_spills": 0, "shared_bytes": 100} | wrong
    assert Binary("k", "", "sm_90", 4, shared_limit_bytes=100, **numbers).fits is fits


TEN_SIZES = """
import torch
from tools.binaries import source_of
from topd_kernels.divergence_rows import launches as d
from topd_kernels.logprob_rows import launches as l
from topd_kernels.scaled_rows import launches as r
from topd_kernels.weighted_gather import launches as g
from topd_kernels.weighted_scatter import launches as s
binaries = {}
for n in (1, 2, 3, 16, 17, 100, 128, 1000, 2048, 4099):
    student, teacher = torch.empty(n, 1000), torch.empty(n, 1000)
    odd = n % 2  # of a larger tensor: not aligned
    ids, tokens = (torch.zeros(size + odd, dtype=torch.int64)[odd:] for size in (5 * n, n))
    ids, weights = ids.view(n, 5), torch.empty(n, 5)
    grad = torch.empty(n, 1000, dtype=torch.bfloat16)
    spec = d.Spec(1.0, None, 1.0, None, 1.0, "jsd", 0.5, 0.1)
    splits = 1 if n > 100 else 3
    launches = d.launches(student, teacher, None, None, tokens, spec, grad, True, splits=splits)[0]
    launches += l.launches(student, None, ids, l.Spec(1.0, None, 1.0), grad, grad, True, splits=splits)[0]
    table = torch.empty(9, 1000)
    launches += g.launches(student, table, ids, weights) + s.launches(table, student, ids, weights)
    number = torch.empty(())
    launches += r.launches(grad, student, number.expand(n)) + r.launches(grad, student, weights[:, 0])
    for i, launch in enumerate(launches):
        binaries.setdefault((i, launch.name), set()).add((source_of(launch).hash(), launch.num_warps))
print(sorted(set(map(len, binaries.values()))), len(binaries))
"""


def test_ten_different_n_need_one_binary_of_each_kernel():
    done = python("-c", TEN_SIZES)
    assert done.stdout == "[1] 16\n", done.stdout + done.stderr


@pytest.mark.slow
def test_no_kernel_takes_more_instructions_than_the_table_says():
    """Where the kernels were made leaner, `python -m tools.gpu_doc` writes the table anew."""
    done = python("-m", "tools.instructions", "--targets", "sm_90")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_count_that_rises_by_more_than_two_percent_is_named(monkeypatch):
    table = {"triton": "3.9.0", "instructions": {"jsd 1 statistics": {"sm_90": 50.0}}}
    monkeypatch.setattr(instructions, "held", lambda: table)
    assert instructions.risen({"jsd 1 statistics": {"sm_90": 51.0}}) == []
    line = "jsd 1 statistics on sm_90: 51.1 instructions an entry, instructions.json has 50.0"
    assert instructions.risen({"jsd 1 statistics": {"sm_90": 51.1}}) == [line]
    assert instructions.risen({"jsd 2 sweep": {"sm_90": 1.0}}) == [
        "jsd 2 sweep on sm_90: 1.0 instructions an entry, instructions.json has None"
    ]


def test_the_table_has_every_kernel_that_goes_over_a_vocabulary():
    table = instructions.held()["instructions"]
    assert set(table) == set(instructions.counted("sm_90"))
    assert all(set(by_target) == set(TARGETS) and min(by_target.values()) > 0 for by_target in table.values())
