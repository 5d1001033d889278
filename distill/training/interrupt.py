"""Stopping when asked to: SIGTERM, SIGHUP and SIGINT are noted, and obeyed between two steps."""

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


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Note SIGTERM, SIGHUP and SIGINT. In a thread, signals stay as they are.

    SIGTERM and SIGHUP are only ever noted: launchers and schedulers send them twice, and the second must not end a
    process that is writing its checkpoint. A second SIGINT, from a person who is done waiting, acts as it did before.
    One that whoever started the process wants ignored, as ``nohup`` does SIGHUP and a shell's ``&`` does SIGINT, stays
    ignored.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    before = {number: handler for number, handler in handlers.items() if handler != signal.SIG_IGN}

    def note(number: int, _frame: FrameType | None) -> None:
        stop.signal = Signals(number)
        if number == signal.SIGINT:
            signal.signal(number, before[signal.SIGINT])

    try:
        for number in before:
            signal.signal(number, note)
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
