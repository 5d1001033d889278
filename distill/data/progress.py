"""How far a preparation is, on stderr: one line that moves on a terminal, now and then a line in a log file."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console

PLAIN_EVERY = 10.0
"""Seconds between two lines where there is no terminal; what takes less shows none."""

MOVING_EVERY = 0.2
"""Seconds between two looks of the line that moves."""

Show = Callable[[int], None]
"""show(done): how much is done, as often as one likes."""


@contextmanager
def progress(title: str, unit: str, done: int = 0, wanted: int | None = None) -> Iterator[Show]:
    """Show how many ``unit`` are done, of which ``done`` were before, and the time to ``wanted`` if that is known."""
    console = Console(stderr=True)
    started = time.monotonic()

    def line(now_done: int, seconds: float) -> str:
        speed = (now_done - done) / seconds
        text = f"{title}: {now_done:,} {unit}, {speed:,.0f}/s"
        if wanted is None or not speed:
            return text
        left = timedelta(seconds=round(max(wanted - now_done, 0) / speed))
        return f"{text}, {now_done / wanted:.0%} of {wanted:,}, {left} left"

    def every(interval: float, show_line: Callable[[str], None]) -> Show:
        last = started

        def show(now_done: int) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= interval:
                last = now
                show_line(line(now_done, now - started))

        return show

    if console.is_terminal:
        with console.status(title) as status:
            yield every(MOVING_EVERY, status.update)
    else:
        yield every(PLAIN_EVERY, say)


def say(line: str) -> None:
    """A line on stderr."""
    print(line, file=sys.stderr, flush=True)
