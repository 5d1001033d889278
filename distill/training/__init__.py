"""The one training loop that every stage shares, and what it stands on."""

from distill.objective import Batch, Objective, Part
from distill.training.loop import Cadence, TrainResult, train
from distill.training.nonfinite import NonFiniteLoss
from distill.training.optim import parameter_groups, schedule

__all__ = [
    "Batch",
    "Cadence",
    "NonFiniteLoss",
    "Objective",
    "Part",
    "TrainResult",
    "parameter_groups",
    "schedule",
    "train",
]
