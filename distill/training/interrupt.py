"""Stopping when asked to: SIGTERM and SIGINT are noted, and obeyed between two steps."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from signal import Signals
from types import FrameType


@dataclass
class Stop:
    """Whether a signal asked the run to stop, and which one."""

    signal: Signals | None = None

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells count: 143 for SIGTERM, 130 for SIGINT."""
        assert self.signal is not None
        return 128 + self.signal


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Note the first SIGTERM or SIGINT; the second acts as it did before. In a thread, signals stay as they are."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def put_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, _frame: FrameType | None) -> None:
        stop.signal = Signals(number)
        put_back()

    try:
        for number in before:
            signal.signal(number, note)
        yield stop
    finally:
        put_back()
