"""On "triton" two runs give the same bits, and every number of rows takes the same binaries."""

import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import binaries_made
import compare
import pytest
import torch
from binaries_made import binaries_of_more_rows
from compare import TENSORS
from gpu_cases import EACH_SIZE, REAL, Size, problem_of, scores_of, windows_of
from torch import Tensor
from triton_cases import DEVICE, NEEDS_TRITON

import topd
from topd_kernels.transport.launches import transport

EVERYTHING = compare.OPTIONS["everything"]


def divergence(size: Size, options: dict[str, Any], kind: topd.Divergence) -> list[Tensor]:
    problem = problem_of(size, options, torch.bfloat16, kind)
    outcome = compare.by_topd(problem, "triton", torch.randn(size.rows, device=DEVICE), workspace_bytes=size.workspace_bytes)
    return [outcome.value, *outcome.grads.values()]


def logprobs(size: Size, count: int) -> list[Tensor]:
    """With an entropy, and repeats where a row has several ids."""
    student = problem_of(size, {}, torch.bfloat16).student.leaves(TENSORS)
    ids = torch.randint(size.vocab, (size.rows, count), device=DEVICE)
    ids[:, 1::2] = ids[:, : count - 1 : 2]
    options = {"return_entropy": True, "backend": "triton", "workspace_bytes": size.workspace_bytes}
    values = topd.linear_logprobs(student.hidden, student.head(), ids, **options)
    torch.autograd.backward(values, [torch.randn_like(value) for value in values])
    return [*(value.detach() for value in values), student.hidden.grad, student.weight.grad]


def scores(size: Size) -> list[Tensor]:
    problem = problem_of(size, {"student": {"bias": True}}, torch.bfloat16)
    table = scores_of(problem, size.workspace_bytes, trainable=False)
    return [table.forward_kl, table.reverse_kl, table.student_entropy, table.teacher_entropy, table.top1_agreement]


def transported() -> list[Tensor]:
    window = (50, 37) if DEVICE.type == "cuda" else (5, 4)
    table, student, student_lengths, teacher, teacher_lengths = (part.to(DEVICE) for part in windows_of(window))
    return list(transport(table, student, student_lengths, table, teacher, teacher_lengths, "cosine", 0.05, 200, 1e-4))


RUNS: dict[str, Callable[[Size], list[Tensor]]] = {
    "linear_divergence": lambda size: divergence(size, EVERYTHING, topd.JSD()),
    "linear_logprobs": lambda size: logprobs(size, size.ids),
    "score_tokens": scores,
    "transport": lambda size: transported(),
}


@NEEDS_TRITON
@EACH_SIZE
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_two_runs_give_the_same_bits(run, size):
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        results.append(run(size))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="the interpreter compiles nothing")
def test_ten_numbers_of_rows_take_the_binaries_of_the_first():
    """The vocabulary's rows are aligned, as models' are."""
    size = replace(REAL[-1], vocab=-(-REAL[-1].vocab // 64) * 64, student_width=256)

    def run(rows: int) -> None:
        fewer = replace(size, rows=rows)
        for kind in (topd.ReverseKL(), topd.JSD()):
            divergence(fewer, {}, kind)
        scores(fewer)
        for count in (1, size.ids):
            logprobs(fewer, count)

    assert binaries_of_more_rows(run, (24, 1, 2, 7, 16, 33, 64, 100, 255, 256)) == {}


@pytest.mark.parametrize("specialised", [False, True])
def test_binaries_are_counted(specialised, monkeypatch):
    """A device's cache of a kernel is a tuple that begins with a dict of binaries."""
    kernel, unused = (SimpleNamespace(device_caches=defaultdict(lambda: ({}, {}, None))) for _ in range(2))

    def run(rows: int) -> None:
        kernel.device_caches[0][0]["16" if specialised and rows % 16 == 0 else "any"] = "binary"

    kernel.device_caches[0][0]["from before"] = "binary"
    monkeypatch.setattr(binaries_made, "kernels", lambda: {"kernel": kernel, "unused": unused})
    assert binaries_of_more_rows(run, (3, 5, 16)) == ({"kernel": (1, 2)} if specialised else {})


COUNTED = """
from binaries_made import compiled, kernels
print(*sorted(kernels()), sum(map(compiled, kernels().values())))
kernel = next(iter(kernels().values()))
kernel.device_caches[0] = ({'a': 1}, {}, None, None, None)
print(compiled(kernel))
"""


def test_kernels_of_triton_have_the_cache_that_is_counted():
    """In a process of its own: without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "CUDA_VISIBLE_DEVICES": "",
        "HIP_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    done = subprocess.run([sys.executable, "-c", COUNTED], capture_output=True, text=True, env=environment)
    words = done.stdout.split()
    names = {"sweep", "finish", "rest", "statistics", "constants", "gather", "scatter", "transport"}
    assert names <= {name.rpartition(".")[2] for name in words}, done.stderr
    assert words[-2:] == ["0", "1"]
