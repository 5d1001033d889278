"""The one training loop that every stage shares, and what it stands on."""

from distill.objective import Batch, Objective, Part
from distill.training.loop import Cadence, TrainResult, train
from distill.training.nonfinite import NonFiniteLoss
from distill.training.optim import parameter_groups, schedule
from distill.training.watching import Best, Hook, Patience

__all__ = [
    "Batch",
    "Best",
    "Cadence",
    "Hook",
    "NonFiniteLoss",
    "Objective",
    "Part",
    "Patience",
    "TrainResult",
    "parameter_groups",
    "schedule",
    "train",
]
