"""What may stand where attention stood.

A mixer is an ``nn.Module`` with the call signature of a Hugging Face attention layer, so that a decoder layer
cannot tell the difference; :class:`Slot` and :class:`Mixer` say what else the rest of the package asks of it.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor, nn

from distill.mixers import based, hedgehog
from distill.mixers.based import BasedMixer
from distill.mixers.discrete_mamba2 import DiscreteMamba2Mixer
from distill.mixers.gated_deltanet import GatedDeltaNetMixer
from distill.mixers.hedgehog import HedgehogMixer
from distill.mixers.kept_heads import HeadHybrid
from distill.mixers.mamba2 import Mamba2Mixer
from distill.mixers.rotary import Rotation
from distill.mixers.sliding_window import SlidingWindowMixer
from distill.ssd.factors import MatrixFactors


class Slot(Protocol):
    """What stands where attention stood: a mixer, a mixer beside heads that are kept, or attention behind a window.

    All are ``nn.Module``s.

    Attributes:
        of_attention: it is built from the attention it replaces, has a cache like attention's, and nothing of ``Mixer``
            but what stands here.
        kept_heads: the query heads that keep attention beside the mixer.
        without_factors: why a matrix has no factors; then there is neither ``matrix_factors`` nor
            ``matrix_parameters``, and MOHAWK's first stage is refused or passes by.
        projections_frozen: the rows of ``in_proj`` that make x, B and C (v, k and q) get no gradient.
    """

    of_attention: bool
    kept_heads: Sequence[int]
    without_factors: str | None
    projections_frozen: bool

    def __call__(self, hidden_states: Tensor, **attention_arguments: Any) -> tuple[Tensor, None]:
        """(B, T, D) to (B, T, D), continuing from ``cache`` where given; None for attention weights."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """As of any module."""
        ...

    def state_bytes(self, dtype: torch.dtype) -> int:
        """Bytes it remembers per sequence in a model of ``dtype``, whatever the sequence's length."""
        ...


class Mixer(Slot, Protocol):
    """The face of every mixer, also beside kept heads.

    ``valid_BT`` is False at padding, ``resets_BT`` True where a packed document begins, and ``position_embeddings``
    is the (cos, sin) that the decoder hands to its layers, which a mixer with ``rope: keep`` reads.
    ``n_heads`` is H below, all copies of a head counted (``distill.copies``).
    """

    n_heads: int
    head_dim: int
    in_proj: nn.Linear
    out_proj: nn.Linear

    def mixing_matrix(
        self,
        hidden_BTD: Tensor,
        *,
        valid_BT: Tensor | None = None,
        resets_BT: Tensor | None = None,
        position_embeddings: Rotation | None = None,
    ) -> Tensor:
        """The (B, H, T, T) matrix it multiplies its values with, to look at; documents and padding are zeros in it."""
        ...

    def matrix_factors(
        self,
        hidden_BTD: Tensor,
        *,
        valid_BT: Tensor | None = None,
        resets_BT: Tensor | None = None,
        position_embeddings: Rotation | None = None,
    ) -> MatrixFactors:
        """What that matrix is made of, borders of documents and padding apart; MOHAWK's first stage matches it so."""
        ...

    def matrix_parameters(self) -> list[nn.Parameter]:
        """The parameters that shape that matrix.

        ``in_proj`` is among them whole. Its rows that have no say get a gradient of zeros, so that weight decay alone
        would move them: that is why ``MixingStage`` has none.
        """
        ...

    def head_outputs(
        self,
        hidden_BTD: Tensor,
        *,
        valid_BT: Tensor | None = None,
        resets_BT: Tensor | None = None,
        position_embeddings: Rotation | None = None,
    ) -> Tensor:
        """(B, T, H·P): what the output projection reads, head by head."""
        ...


def is_mixer(slot: Slot) -> TypeGuard[Mixer]:
    """Whether it has all of the ``Mixer`` protocol: attention behind a window has not."""
    return not slot.of_attention


def bare(slot: Slot) -> Mixer:
    """The mixer alone, without the heads that may be kept beside it; of a slot that has one."""
    assert is_mixer(slot), f"a {type(slot).__name__} has no mixer"
    return slot.mixer if isinstance(slot, HeadHybrid) else slot


MIXERS: dict[str, type[nn.Module]] = {
    "mamba2": Mamba2Mixer,
    "discrete_mamba2": DiscreteMamba2Mixer,
    "gated_deltanet": GatedDeltaNetMixer,
    "based": BasedMixer,
    "hedgehog": HedgehogMixer,
}
"""Those with a state of constant size, which are built from sizes."""

FEATURES: dict[str, Callable[[int], int]] = {"based": based.n_features, "hedgehog": hedgehog.n_features}
"""Of queries and keys of so many numbers, where the state holds features of them and not themselves."""

KINDS: dict[str, type[nn.Module]] = {**MIXERS, "sliding_window": SlidingWindowMixer}
"""All; where ``of_attention`` is set a mixer is built from the attention that it replaces."""

BESIDE: dict[str, type[nn.Module]] = {"heads": HeadHybrid}
"""What a layer of a kind in ``MIXERS`` becomes where something stands beside its mixer."""

__all__ = [
    "BESIDE",
    "FEATURES",
    "KINDS",
    "MIXERS",
    "BasedMixer",
    "DiscreteMamba2Mixer",
    "GatedDeltaNetMixer",
    "HeadHybrid",
    "HedgehogMixer",
    "Mamba2Mixer",
    "Mixer",
    "SlidingWindowMixer",
    "Slot",
    "bare",
    "is_mixer",
]
