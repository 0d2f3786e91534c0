"""Ctrl-C and SIGTERM as exceptions that do not come in the middle of a write."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopSignals:
    """Raises KeyboardInterrupt for SIGINT and SystemExit for SIGTERM; after the block where `held` is active."""

    def __init__(self) -> None:
        self._holding = False
        self._waiting: BaseException | None = None

    def handle(self, number: int, _frame: FrameType | None) -> None:
        stop: BaseException = KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
        if not self._holding:
            raise stop
        self._waiting = stop

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold back a signal until the block has ended."""
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
        if self._waiting is not None:
            stop, self._waiting = self._waiting, None
            raise stop


@contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Handle both signals until the block ends: in the main thread, and only where nobody else handles them."""
    signals = StopSignals()
    taken = {}
    if threading.current_thread() is threading.main_thread():
        ours = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
        taken = {number: own for number, own in ours.items() if signal.getsignal(number) == own}
    try:
        for number in taken:
            signal.signal(number, signals.handle)
        yield signals
    finally:
        for number, own in taken.items():
            signal.signal(number, own)
