"""What a run measures of its student while it trains, and what it decides by that.

A measure never changes what is trained: generators, modes and the default dtype are put back behind it. A decision is
made of what was measured and of nothing else, so a run that was killed and goes on decides as one that was not.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from distill.evaluating import evaluating
from distill.training import checkpoint

Mode = Literal["min", "max"]


@dataclass(frozen=True)
class Hook:
    """Something that is measured.

    Attributes:
        measure: called with the student and the steps made, on every process at once, in eval mode without gradients;
            what it returns is logged, and is the same on all processes.
        every: steps between two calls; it is also called before the first step and after the last. None for only then.
    """

    measure: Callable[[nn.Module, int], dict[str, float]]
    every: int | None = None


@dataclass(frozen=True)
class Best:
    """By what the best step is told.

    Attributes:
        metric: a name among what hooks return.
        mode: whether lower or higher is better.
        every: steps between two times it is measured, each of which gets a checkpoint.
    """

    metric: str
    mode: Mode
    every: int


@dataclass(frozen=True)
class Patience:
    """When training is over before its last step: ``patience`` measures in a row of ``metric`` without one that is
    better by more than ``min_delta`` than all before."""

    metric: str
    mode: Mode
    patience: int
    min_delta: float = 0.0


def is_due(step: int, steps: int, every: int | None) -> bool:
    """At the start, at the end, and every ``every`` steps."""
    return step in (0, steps) or (every is not None and step % every == 0)


def measured(student: nn.Module, hooks: Sequence[Hook], step: int) -> dict[str, float]:
    """What the hooks return at this step, all together."""
    values: dict[str, float] = {}
    for hook in hooks:
        with untouched(student):
            values |= hook.measure(student, step)
    return values


@contextmanager
def untouched(student: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; at the end all that a next training step depends on is as it was."""
    generators, dtype = checkpoint.rng_state(), torch.get_default_dtype()
    try:
        with evaluating(student):
            yield
    finally:
        torch.set_default_dtype(dtype)
        checkpoint.set_rng_state(generators)


def is_better(value: float, than: float | None, mode: Mode, by: float = 0.0) -> bool:
    """Whether a value beats what was best so far, by more than ``by``; NaN never does, the first number always."""
    if math.isnan(value):
        return False
    if than is None:
        return True
    return value < than - by if mode == "min" else value > than + by


def metric_by_default(values: Mapping[str, float]) -> str | None:
    """Lower is better: KL, or loss where no KL is measured."""
    return next((name for name in ("kl", "loss") if name in values), None)
