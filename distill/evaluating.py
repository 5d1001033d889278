"""Models as they are measured: nothing random, no gradients, and afterwards as they were."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel


@contextmanager
def evaluating(*models: nn.Module | None) -> Iterator[None]:
    """Evaluation mode without gradients; every module's own mode comes back at the end.

    ``no_grad`` and not ``inference_mode``: dynamic rotary embeddings rewrite their buffers in a forward, and
    buffers born in inference mode would break the next training step.
    """
    modes = {module: module.training for model in models if model is not None for module in model.modules()}
    try:
        for module in modes:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def frozen(model: PreTrainedModel) -> Iterator[None]:
    """A teacher beside a student that trains: no gradients, and its own precision whatever the student's autocast."""
    with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
        yield
