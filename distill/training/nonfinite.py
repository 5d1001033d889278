"""A loss or gradient that is NaN or infinite: what it was, where it began, and where to go back to."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.errors import UserError


class NonFiniteLoss(UserError):  # noqa: N818 (a name that says what happened)
    """The loss or the gradient of a step is NaN or infinite; no weight and no checkpoint was changed by it.

    Attributes:
        step: the step that failed, counted from 1 as in metrics.jsonl.
        part: the first part of the loss that is not finite; None when only the gradient is not.
        place: the first module whose output, else the first parameter whose gradient, is not finite, if any.
        checkpoint: the newest checkpoint, if any.
    """

    everyones = True

    def __init__(self, step: int, part: str | None, place: str | None, checkpoint: Path | None) -> None:
        self.step, self.part, self.place, self.checkpoint = step, part, place, checkpoint
        what = f"the loss of {part}" if part else "the gradient"
        where = f" It began at {place}." if place else ""
        back = f"the last good checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint yet"
        super().__init__(
            f"{what} is not finite at step {step}.{where} Nothing was overwritten: {back}."
            " A lower learning rate, a longer warm-up or dtype float32 usually helps"
        )


def first_nonfinite(values: Mapping[str, float]) -> str | None:
    """The first name whose value is NaN or infinite."""
    return next((name for name, value in values.items() if not math.isfinite(value)), None)


def first_nonfinite_gradient(student: nn.Module) -> str | None:
    """The first parameter with a NaN or infinity in its gradient."""
    for name, parameter in student.named_parameters():
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            return f"the gradient of {name}"
    return None


@contextmanager
def watch_outputs(student: nn.Module) -> Iterator[list[str]]:
    """Yield a list that fills with the modules whose output is not finite, in the order they finish.

    A module finishes before the one that contains it, so the first entry is the innermost culprit.
    """
    found: list[str] = []

    def watch(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not all(tensor.isfinite().all() for tensor in _tensors(output)):
                found.append(f"the output of {name or 'the model'}")

        return module.register_forward_hook(hook)

    handles = [watch(name, module) for name, module in student.named_modules()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _tensors(output: Any) -> Iterator[Tensor]:
    """The float tensors in what a module returned: a tensor, or tuples and mappings of them."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        yield from _tensors(tuple(output.values()))
    elif isinstance(output, Iterable) and not isinstance(output, str):
        for entry in output:
            yield from _tensors(entry)
