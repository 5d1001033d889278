"""What may stand where attention stood.

A mixer is an ``nn.Module`` with the call signature of a Hugging Face attention layer, so that a decoder layer
cannot tell the difference; :class:`Mixer` says what else the rest of the package asks of it.
"""

from collections.abc import Callable
from typing import Any, Protocol

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


class Mixer(Protocol):
    """The face of every mixer.

    ``valid_BT`` is False at padding, ``resets_BT`` True where a packed document begins, and ``position_embeddings``
    is the (cos, sin) that the decoder hands to its layers, which a mixer with ``rope: keep`` reads.
    Where ``projections_frozen`` is set, the rows of ``in_proj`` that make x, B and C (v, k and q) get no gradient.
    ``of_attention`` is set where a mixer is built from the attention it replaces: it has a cache like attention's, no
    ``in_proj``, and of what stands below only its call and ``state_numel``.
    ``without_factors`` says why a matrix has no factors; such a mixer has neither ``matrix_factors`` nor
    ``matrix_parameters``, and MOHAWK's first stage is refused for it.
    ``n_heads`` is H below, all copies of a head counted (``distill.copies``).
    """

    n_heads: int
    head_dim: int
    in_proj: nn.Linear
    out_proj: nn.Linear
    projections_frozen: bool
    of_attention: bool
    without_factors: str | None

    def __call__(self, hidden_states: Tensor, **attention_arguments: Any) -> tuple[Tensor, None]:
        """(B, T, D) to (B, T, D), continuing from ``cache`` where given; None for attention weights."""
        ...

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
        """The parameters that shape that matrix."""
        ...

    def mix(
        self,
        hidden_BTD: Tensor,
        *,
        valid_BT: Tensor | None = None,
        resets_BT: Tensor | None = None,
        position_embeddings: Rotation | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(y_BTHP, x_BTHP): that product, and the values, before gate and output projection."""
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

    def state_numel(self) -> int:
        """Numbers it remembers per sequence, whatever the sequence's length."""
        ...


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
]
