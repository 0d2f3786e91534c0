"""`pytest bench`: the cases of `topd bench` as tests of pytest-benchmark, for its --benchmark-save and --benchmark-compare.

They are not among the tests of `make test`. A peer that cannot compute a loss is skipped with its reason.
"""

import importlib.util

import pytest

from topd_bench.cases import CASES


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of these benchmarks."""
    if importlib.util.find_spec("pytest_benchmark") is None:
        raise pytest.UsageError("pytest-benchmark is not installed: pip install pytest-benchmark")
    group = parser.getgroup("topd bench")
    group.addoption("--shape", choices=list(CASES), default="small", help="shape of the inputs (default small)")
    group.addoption("--dtype", choices=("float32", "bfloat16"), default="float32", help="of hidden states and weights")
    group.addoption("--timed-rounds", type=int, default=5, help="timed calls a peer (default 5)")
