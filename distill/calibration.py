"""What a teacher's layers read, from a handful of random tokens: enough to seed what has no counterpart in attention.

Random tokens, because conversion must not need data: what is measured (sizes, a direction that never changes sign)
belongs to the norms and embeddings rather than to the text. On text the direction is as good (docs/experiments.md).
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.capture import attention_inputs

SEQUENCES, LENGTH = 8, 128
RIDGE = 1e-2  # of the mean variance; keeps the direction sane where there are fewer tokens than dimensions


def calibration_inputs(teacher: PreTrainedModel, layers: Iterable[int], seed: int = 0) -> dict[int, Tensor]:
    """What the attention of each layer reads for a few sequences of random tokens: (tokens, D) in fp32, by layer."""
    text = teacher.config.get_text_config()
    length = min(LENGTH, text.max_position_embeddings)
    generator = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(text.vocab_size, (SEQUENCES, length), generator=generator)
    batch = {"input_ids": ids_BT, "position_ids": torch.arange(length).expand(SEQUENCES, -1)}
    on_device = {name: tensor.to(teacher.device) for name, tensor in batch.items()}
    return {
        index: inputs_BTD.flatten(0, 1).float()
        for index, inputs_BTD in attention_inputs(teacher, on_device, layers).items()
    }


def steady_direction(inputs_ND: Tensor) -> Tensor:
    """The direction u_D along which inputs vary least for their mean: u · input is 1 on average.

    It maximises (u·μ)² / (uᵀ Σ u), which Σ⁻¹ μ does (Fisher's discriminant against the origin). Behind an RMS norm the
    mean is many standard deviations from zero along it, so u · input behaves like the constant 1: a bias for a
    projection that has none.
    """
    mean_D = inputs_ND.mean(dim=0)
    covariance_DD = torch.cov(inputs_ND.mT)
    ridge = RIDGE * covariance_DD.diagonal().mean()
    direction_D = torch.linalg.solve(covariance_DD + ridge * torch.eye(len(mean_D), device=mean_D.device), mean_D)
    return direction_D / (direction_D @ mean_D)
