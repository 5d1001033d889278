"""How far the heads of a mixer look back, where nothing that they read changes it, as at the start."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.copies import spread
from distill.mixers import (
    DiscreteMamba2Mixer,
    GatedDeltaNetMixer,
    HedgehogMixer,
    Mamba2Mixer,
    Mixer,
    discrete_mamba2,
    hedgehog,
    mamba2,
)
from distill.mixers import gated_deltanet as delta

SET_MEMORY: dict[type, Callable[[Any, Tensor], None]] = {
    Mamba2Mixer: mamba2.set_memory_,
    DiscreteMamba2Mixer: discrete_mamba2.set_memory_,
    GatedDeltaNetMixer: delta.set_memory_,
    HedgehogMixer: hedgehog.set_memory_,
}
"""How a mixer is made to forget by 1/e in so many positions, (H,), whatever it reads."""

RATE: dict[type, Callable[[Any], Tensor]] = {
    Mamba2Mixer: lambda mixer: F.softplus(mixer.dt_bias) * mixer.A_log.exp(),
    DiscreteMamba2Mixer: lambda mixer: F.softplus(mixer.A_log_bias),
    GatedDeltaNetMixer: lambda mixer: F.softplus(mixer.dt_bias) * mixer.A_log.exp(),
    HedgehogMixer: lambda mixer: F.softplus(mixer.A_log_bias),
}
"""−log decay, (H,), where nothing read changes it."""


def memories_of(mixer: Mixer) -> Tensor:
    """τ, (H,): each head forgets by 1/e in τ positions; of a mixer as seeding leaves it, which reads nothing there."""
    return 1 / RATE[type(mixer)](mixer).detach()


@torch.no_grad()
def set_apart_(mixer: Mixer, copies: int) -> None:
    """Give the copies of every head memories as far apart as can be, of those that the mixer's heads have now."""
    SET_MEMORY[type(mixer)](mixer, spread(memories_of(mixer), copies))
