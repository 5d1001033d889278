"""How far a run is, on stderr: a bar on a terminal, now and then a plain line in a log file."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from distill.engines import processes

PLAIN_EVERY = 10.0
"""Seconds between two lines where there is no terminal."""

Show = Callable[[int, float, float], None]
"""show(step, loss, tokens_per_second) after every step."""


@contextmanager
def progress(title: str, steps: int, done: int) -> Iterator[Show]:
    """Show the steps of ``title``, of which ``done`` were made before."""
    if not processes.is_main():
        yield lambda step, loss, tokens_per_second: None
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _plain(console, title, steps, done)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=steps, completed=done, speed="")

        def show(step: int, loss: float, tokens_per_second: float) -> None:
            bar.update(task, completed=step, speed=_numbers(loss, tokens_per_second))

        yield show


def _plain(console: Console, title: str, steps: int, done: int) -> Show:
    started = time.monotonic()
    last = started - PLAIN_EVERY

    def show(step: int, loss: float, tokens_per_second: float) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < PLAIN_EVERY:
            return
        last = now
        left = timedelta(seconds=round((now - started) / (step - done) * (steps - step)))
        line = f"{title}: step {step}/{steps}, {_numbers(loss, tokens_per_second)}, {left} left"
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    return show


def _numbers(loss: float, tokens_per_second: float) -> str:
    return f"loss {loss:.4f}, {tokens_per_second:,.0f} tokens/s"
