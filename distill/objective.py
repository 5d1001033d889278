"""What a stage gives to the loop: a weight per batch, and a loss in parts."""

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from torch import Tensor

Batch = dict[str, Tensor]
"""``input_ids``, ``position_ids``, ``labels`` (B, T) int64 and ``valid`` (B, T) bool; see distill/data."""


class Part(NamedTuple):
    """One summand of a batch's loss.

    Attributes:
        name: what it belongs to, for example "layers.3"; shown when the loss stops being finite.
        loss_sum: computes the *sum* over the batch (over scored tokens, or over sequences), an fp32 scalar with its
            graph. It may be called twice, so it must give the same both times. Of the student it calls submodules,
            or ``student.forward``: engines call it ``within`` the student. It is called under the student's autocast,
            out of which it takes what it asks the teacher.
    """

    name: str
    loss_sum: Callable[[], Tensor]


class Objective(Protocol):
    """The loss of a step is Σ parts' loss_sum / Σ weight, summed over all its micro-batches and processes."""

    layerwise: bool
    """Whether parts are layers that share nothing, so that each can train by itself."""

    def begin(self, done: float) -> None:
        """Called before every step with the share of the stage's steps that are done, from 0 to less than 1.

        All of a step's passes follow, also those that compute it a second time. Nothing else tells an objective how
        far training is, so a run that goes on after an interruption goes on with the same loss.
        """

    def weight(self, batch: Batch) -> float:
        """How many units (scored tokens, sequences) the loss of ``batch`` is a mean over; no forward needed."""

    def parts(self, batch: Batch) -> Iterator[Part]:
        """The loss of ``batch``, part by part.

        In one process each part is sent backward, and its graph freed, before the next is asked for: so one layer's
        activations are all that is alive. No two parts may share a graph.
        """
