"""What a teacher's layers read, from a handful of random tokens: enough to seed what has no counterpart in attention.

Random tokens, because conversion must not need data: what is measured (sizes, a direction that never changes sign)
belongs to the weights rather than to the text; measured on text it serves no better (docs/experiments.md).
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.capture import LayerTrace, traced_layers

SEQUENCES, LENGTH = 8, 128
TOKENS_PER_DIMENSION = 2


def calibrate(teacher: PreTrainedModel, layers: Iterable[int], seed: int = 0) -> Iterator[tuple[int, LayerTrace]]:
    """What attention reads (``attention_input``) in each of the given layers, for a few sequences of random tokens.

    One layer after another, so that one layer's is all that is in memory.
    """
    text = teacher.config.get_text_config()
    length = min(LENGTH, getattr(text, "max_position_embeddings", LENGTH))
    sequences = max(SEQUENCES, -(-TOKENS_PER_DIMENSION * text.hidden_size // length))
    generator = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(text.vocab_size, (sequences, length), generator=generator)
    batch = {"input_ids": ids_BT, "position_ids": torch.arange(length).expand(sequences, -1)}
    on_device = {name: tensor.to(teacher.device) for name, tensor in batch.items()}
    return traced_layers(teacher, on_device, layers, wants=["attention_input"])


def steady_direction(inputs_BTD: Tensor) -> Tensor:
    """The direction u_D along which inputs vary least for their mean: u · input is 1 on average.

    It maximises (u·μ)² / (uᵀ Σ u), which Σ⁻¹ μ does (Fisher's discriminant against the origin). Behind an RMS norm the
    mean is many standard deviations from zero along it, so u · input behaves like the constant 1: a bias for a
    projection that has none.
    """
    inputs_ND = inputs_BTD.flatten(0, 1).float()
    mean_D = inputs_ND.mean(dim=0)
    covariance_DD = torch.cov(inputs_ND.mT)
    # As strong as the covariance is uncertain: D dimensions seen through N tokens.
    ridge = len(mean_D) / len(inputs_ND) * covariance_DD.diagonal().mean()
    direction_D = torch.linalg.solve(covariance_DD + ridge * torch.eye(len(mean_D), device=mean_D.device), mean_D)
    return direction_D / (direction_D @ mean_D)
