"""Interleaved rounds and their ratios, by a clock that only counts."""

import gc
import subprocess
import sys

import pytest

from topd_bench.cpu.clock import WallClock
from topd_bench.timing import Sample, Spread, interleave, ratio, take_turns, times_ms


class Counting:
    """A clock that gives each call the next number of milliseconds."""

    def __init__(self) -> None:
        self.calls = 0

    def sample(self, run) -> Sample:
        run()
        self.calls += 1
        return Sample(float(self.calls))


def test_contenders_take_turns_after_a_round_that_is_not_counted():
    order, told = [], []
    runs = {name: lambda name=name: order.append(name) for name in "AB"}
    samples = interleave(runs, 2, Counting(), told.append)
    assert order == list("ABABAB")
    assert told == ["warm-up", "round 1/2", "round 2/2"]
    assert {name: [each.time_ms for each in taken] for name, taken in samples.items()} == {"A": [3, 5], "B": [4, 6]}


def test_contenders_that_are_warm_need_no_such_round():
    order = []
    interleave({"A": lambda: order.append("A")}, 3, Counting(), warm_up=False)
    assert order == ["A"] * 3


def test_a_ratio_is_that_of_neighbours_in_a_round():
    """10 / 1, 30 / 10, 90 / 30: the median of the ratios is 3, the ratio of the medians is so only by chance."""
    above, below = ([Sample(time_ms) for time_ms in times] for times in ((10.0, 30.0, 90.0), (1.0, 10.0, 30.0)))
    assert ratio(above, below) == Spread(3.0, 3.0, 10.0)
    assert str(ratio(above, below)) == "3.00 (3.00-10.00)"
    assert times_ms(above) == Spread(30.0, 10.0, 90.0)


def test_rounds_before_an_interrupt_are_whole():
    calls = []

    def second() -> None:
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt

    turns = take_turns({"A": lambda: None, "B": second}, 3, Counting(), lambda text: None, warm_up=False)
    assert next(turns) == {"A": Sample(1.0), "B": Sample(2.0)}
    with pytest.raises(KeyboardInterrupt):
        next(turns)
    assert gc.isenabled()


def test_wall_time_is_that_of_the_call():
    sample = WallClock().sample(lambda: sum(range(100_000)))
    assert sample.time_ms > 0
    assert sample.page_faults >= 0


def test_clocks_know_no_contender():
    code = (
        "import sys, topd_bench.timing, topd_bench.cpu.clock, topd_bench.gpu.clock\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('topd', 'trl') or 'peers' in name])\n"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
