"""Time of Sinkhorn over many window pairs: `pytest bench/test_transport.py`."""

import pytest

from topd_bench.catalogue import CASES
from topd_bench.peers.transport import Pairs, contenders, make_pairs

SETTINGS = CASES["transport"].settings
SOLVERS = ("topd", "ot.batch", "ot.batch matched", "loop of ot.sinkhorn")


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    """Return the window pairs."""
    return make_pairs(*(int(SETTINGS[name]) for name in ("windows", "window", "width")))


@pytest.mark.parametrize("solver", SOLVERS)
def test_transport(benchmark, request, pairs, solver):  # type: ignore[no-untyped-def]
    """Time a solver."""
    runs = contenders(pairs, SETTINGS["epsilon"], SETTINGS["tolerance"])
    if solver not in runs:
        pytest.skip("not installed: pip install POT")
    benchmark.group = "transport"
    benchmark.extra_info["largest row error, K x"] = runs[solver]().row_error
    benchmark.pedantic(runs[solver], rounds=request.config.getoption("--timed-rounds"), warmup_rounds=1)
