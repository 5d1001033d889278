"""Rotary positions where a format keeps their scaling as numbers instead of as a formula."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


def frequency_factors(config: PreTrainedConfig) -> Tensor | None:
    """(P/2,) by how much llama3's scaling divides each frequency θ^(-2i/P); None for other kinds, fp32."""
    text: Any = config.get_text_config()
    rope = text.rope_parameters
    if rope["rope_type"] != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](text, torch.device("cpu"))
    head_dim = 2 * scaled.numel()
    plain = rope["rope_theta"] ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    return plain / scaled.float()
