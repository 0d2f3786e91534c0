"""Time by stage: each moment inside a block belongs to one stage, so that the stages add up to the whole."""

import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch


class Clock(Protocol):
    """What times are read from."""

    def now(self) -> Any:
        """Return a stamp of this moment."""

    def passed(self, stamp: Any) -> bool:
        """Return whether the device has come to a stamp."""

    def seconds(self, start: Any, end: Any) -> float:
        """Return what lies between two stamps that have passed."""

    def wait(self) -> None:
        """Wait until the device has come to every stamp."""


class HostClock:
    """The host's clock, which is right where the host computes."""

    def now(self) -> float:
        return time.perf_counter()

    def passed(self, stamp: float) -> bool:
        return True

    def seconds(self, start: float, end: float) -> float:
        return end - start

    def wait(self) -> None:
        pass


class CudaClock:
    """Events on the stream that is current where a stamp is taken. Nothing waits for the device before `wait`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def now(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def passed(self, stamp: torch.cuda.Event) -> bool:
        return bool(stamp.query())

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return float(start.elapsed_time(end)) / 1e3

    def wait(self) -> None:
        torch.cuda.synchronize(self._device)


def clock_of(device: torch.device) -> Clock:
    """Return the clock of a device: of a GPU its events, of anything else the host's."""
    return CudaClock(device) if device.type == "cuda" else HostClock()


@dataclass
class Timeline:
    """Which stage runs, and how long each has run.

    Attributes:
        clock: of the device.
        seconds, entered: of each stage, in the order in which they came first: its time, and how often it was entered.
    """

    clock: Clock
    seconds: dict[str, float] = field(default_factory=dict)
    entered: Counter[str] = field(default_factory=Counter)
    _marks: "deque[tuple[str, Any]]" = field(default_factory=deque)

    def switch(self, stage: str) -> None:
        """Let the stage that runs end here, and this one begin."""
        self.seconds.setdefault(stage, 0.0)
        self._marks.append((stage, self.clock.now()))

    def settle(self) -> None:
        """Add up what the device has done, and forget its stamps."""
        while len(self._marks) > 1 and self.clock.passed(self._marks[1][1]):
            stage, start = self._marks.popleft()
            self.seconds[stage] += self.clock.seconds(start, self._marks[0][1])

    def close(self) -> None:
        """End the stage that runs, wait for the device, and add everything up."""
        if self._marks:
            self.switch(self._marks[-1][0])
            self.clock.wait()
            self.settle()
            self._marks.clear()
