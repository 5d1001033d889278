"""What the training loop asks of an engine: gradients, a step, and its state on disk."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer

from distill.objective import Part

Parts = Callable[[], Iterator[Part]]
Groups = Sequence[dict[str, Any]]
"""AdamW's parameter groups, as ``distill.training.optim.parameter_groups`` gives them."""


class Engine(Protocol):
    """One way to train a student on one or many processes.

    Attributes:
        optimizer: whose ``param_groups`` hold the learning rates.
        data_rank: which share of the data this process reads, of ``data_ranks``.
        data_ranks: how many shares there are: the processes, or 1 where all read the same.
    """

    optimizer: Optimizer
    data_rank: int
    data_ranks: int

    def backward(self, parts: Parts, scale: float, *, last: bool) -> dict[str, Tensor]:
        """Add ``scale`` times the gradient of the parts' sum, summed over processes, to what the step will use.

        Args:
            parts: of one micro-batch.
            scale: factor on every loss.
            last: whether this is the step's last micro-batch.

        Returns:
            This process's loss sums by name, detached, unscaled; 0 for a part another process computes.
        """

    def step(self, clip: float | None) -> float:
        """Scale the gradient so that its global norm is at most ``clip``, update the weights, forget the gradient.

        Returns:
            The norm before. Where it is not finite, the weights are left alone.
        """

    def forget(self) -> None:
        """Drop gradients that no step will use."""

    def settle(self) -> None:
        """Let the student be the same on every process, before it is measured or saved."""

    def save(self, folder: Path) -> None:
        """Write all that training changes into an empty folder; every process calls it."""

    def load(self, folder: Path) -> None:
        """Put back what ``save`` wrote.

        Raises:
            UserError: it was written by an engine, or on a number of processes, that this one cannot read.
        """

    def close(self) -> None:
        """Let go of gradients, optimizer and hooks; the student stays as it is, for whoever holds it."""
