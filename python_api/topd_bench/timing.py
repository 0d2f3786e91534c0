"""Time by interleaved rounds, ratios by pairs.

A shared machine drifts over seconds, so contenders take turns, A B C A B C, and two of them are compared by the median of the
ratios of their neighbouring samples, quoted with the smallest and the largest. What takes a sample is handed in:
`topd_bench.cpu.clock.WallClock` on a CPU, `topd_bench.gpu.clock.DeviceClock` on a GPU.
"""

import gc
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

Contender = Callable[[], object]


@dataclass(frozen=True)
class Sample:
    """One call: its time, and the pages that the kernel had to hand out meanwhile (minor faults, 4 KiB each; 0 on a GPU)."""

    time_ms: float
    page_faults: int = 0


class Clock(Protocol):
    """What takes one sample of a contender, and frees the contender's result after the time was taken."""

    def sample(self, run: Contender) -> Sample: ...


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of a few numbers."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


def take_turns(
    contenders: Mapping[str, Contender], rounds: int, clock: Clock, progress: Callable[[str], None], *, warm_up: bool = True
) -> Iterator[dict[str, Sample]]:
    """Yield round after round, in each of which every contender runs once, in the same order; an interrupt loses one round.

    Args:
        progress: is told of each round before it begins.
        warm_up: whether a round that is not yielded comes first; without it the contenders must be warm.
    """
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for number in range(0 if warm_up else 1, rounds + 1):
            progress(f"round {number}/{rounds}" if number else "warm-up")
            samples = {name: clock.sample(contender) for name, contender in contenders.items()}
            if number:
                yield samples
    finally:
        if was_enabled:
            gc.enable()


def interleave(
    contenders: Mapping[str, Contender],
    rounds: int,
    clock: Clock,
    progress: Callable[[str], None] = lambda text: None,
    *,
    warm_up: bool = True,
) -> dict[str, list[Sample]]:
    """Return each contender's samples, one a round; the arguments are those of `take_turns`."""
    turns = list(take_turns(contenders, rounds, clock, progress, warm_up=warm_up))
    return {name: [samples[name] for samples in turns] for name in contenders}


def whole_rounds(
    contenders: Mapping[str, Contender],
    rounds: int,
    clock: Clock,
    progress: Callable[[str], None],
    *,
    warm_up: bool = True,
) -> tuple[dict[str, list[Sample]], bool]:
    """Return the samples of the rounds that were not interrupted, and whether all of them ran; the arguments are those of
    `take_turns`."""
    samples: dict[str, list[Sample]] = {name: [] for name in contenders}
    try:
        for turn in take_turns(contenders, rounds, clock, progress, warm_up=warm_up):
            for name, sample in turn.items():
                samples[name].append(sample)
    except KeyboardInterrupt:
        return samples, False
    return samples, True


def times_ms(samples: Sequence[Sample]) -> Spread:
    return Spread.of([sample.time_ms for sample in samples])


def ratio(above: Sequence[Sample], below: Sequence[Sample]) -> Spread:
    """Return the time of `above` over that of `below`, round by round."""
    return Spread.of([a.time_ms / b.time_ms for a, b in zip(above, below, strict=True)])
