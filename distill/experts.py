"""Mixtures of experts, as far as planning has to know them: a token meets k of E experts, whichever they are.

Which ones is decided by data, which planning has not. For costs only their number counts: a token's share of the
weights is k/E, and what a layer keeps for backward is what one dense layer keeps on k copies of every token.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STACKED = ("gate_up_proj", "down_proj")
"""The weights of transformers' experts: (E, 2I, D) and (E, D, I)."""


def idle_parameters(model: Any) -> int:
    """Parameters of a model's experts that a token does not meet."""
    config = model.config.get_text_config()
    chosen = getattr(config, "num_experts_per_tok", None)
    return sum(
        weight.numel() * (weight.shape[0] - chosen) // weight.shape[0]
        for _, experts in _stacks(model)
        for weight in (getattr(experts, name) for name in STACKED)
        if chosen
    )


def make_dense_(layer: nn.Module) -> None:
    """Let the experts of a layer, in place, compute what k of them would, whatever the router says."""
    for parent, experts in list(_stacks(layer)):
        name = next(name for name, child in parent.named_children() if child is experts)
        setattr(parent, name, _Dense(experts))


def _stacks(model: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    """The modules of experts, each with the module that holds it."""
    for parent in model.modules():
        for child in parent.children():
            weights = [getattr(child, name, None) for name in STACKED]
            if all(isinstance(weight, nn.Parameter) and weight.dim() == 3 for weight in weights):
                yield parent, child


class _Dense(nn.Module):
    """The first expert, on k copies of every token."""

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = (nn.Parameter(getattr(experts, name)[0].detach()) for name in STACKED)
        self.act_fn = experts.act_fn

    def forward(self, hidden_ND: Tensor, chosen_NK: Tensor, weights_NK: Tensor) -> Tensor:
        K = chosen_NK.shape[1]
        copies_MD = hidden_ND.repeat(K, 1)
        gate_MI, up_MI = F.linear(copies_MD, self.gate_up_proj).chunk(2, dim=-1)
        out_MD = F.linear(self.act_fn(gate_MI) * up_MI, self.down_proj) * weights_NK.t().reshape(-1, 1)
        return torch.stack(out_MD.chunk(K)).sum(0).to(hidden_ND.dtype)
