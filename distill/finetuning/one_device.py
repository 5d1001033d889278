"""Tuning trains on one device, however many a process sees."""

from typing import TypeVar

from transformers import TrainingArguments

Arguments = TypeVar("Arguments", bound=TrainingArguments)


def on_one_device(arguments: Arguments) -> Arguments:
    """The same arguments, by which the first visible GPU is the only one.

    Where a process sees several, transformers would wrap the model in ``nn.DataParallel``, which TRL refuses once all
    weights are loaded. There is no setting against it; transformers' own Trainer does as much as this where a model is
    split over devices. Tested on a CPU that says it has two GPUs, never where there were several.
    """
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
