"""What decoder, cache and stages ask of a mixer, written once for all whose heads are made of terms.

A mixer says what is its own in two methods: which terms its hidden states make (``_terms``), and how a gate shapes what
comes of them (``gated``). The functions here do the rest and stand in a mixer's class as its methods, under the names
of the ``Mixer`` protocol::

    u → (terms, z)           _terms
    terms → y                terms.run                            y = M v: the heads' mixing matrix times their values
    (y, z) → heads           gated
    heads → out              out_proj
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from distill.cache import MixerCacheLayer
from distill.mixers.parts import between_tokens, bytes_with_inputs
from distill.mixers.rotary import Rotation
from distill.ssd.factors import MatrixFactors


class Terms(Protocol):
    """Everything ``y = M v`` needs, per position."""

    @property
    def values(self) -> Tensor:
        """v_BTHP, what the matrix multiplies."""

    def run(self, *, resets_BT: Tensor | None, cache: MixerCacheLayer | None) -> Tensor:
        """y_BTHP in fp32. With a cache it continues from the state there, which is then brought up to date."""

    def matrix(self, *, resets_BT: Tensor | None) -> Tensor:
        """M, (B, H, T, T), fp32."""


class OfTerms(Protocol):
    """A mixer, as far as the functions of this file look at it.

    Attributes:
        layer_idx: place in the decoder.
        inner: H·P.
        state_dim: N, numbers of state for each of a head's channels.
        conv1d: over (B, T, C), C channels of what the terms are made of.
        out_proj: (B, T, H·P) to (B, T, D).
    """

    layer_idx: int
    inner: int
    state_dim: int
    conv1d: nn.Conv1d
    out_proj: nn.Linear

    def _terms(
        self,
        hidden_BTD: Tensor,
        valid_BT: Tensor | None,
        resets_BT: Tensor | None,
        cache: MixerCacheLayer | None,
        rotation: Rotation | None = None,
    ) -> tuple[Any, Tensor]:
        """The terms, of (B, T, D), and z_BTI for the gate; ``cache`` gives the convolution its past."""

    def gated(self, y_BTI: Tensor, z_BTI: Tensor) -> Tensor:
        """What the heads made behind the gate, (B, T, H·P) of (B, T, H·P) and z; fp32."""


def mix_over_time(
    mixer: OfTerms,
    hidden_states: Tensor,
    *,
    cache: Any = None,
    past_key_values: Any = None,
    valid_BT: Tensor | None = None,
    resets_BT: Tensor | None = None,
    position_embeddings: Rotation | None = None,
    **_attention_only: Any,
) -> tuple[Tensor, None]:
    """A mixer's ``forward``. Shapes (B, T, D) to (B, T, D); the second result stands for attention weights.

    Args:
        cache: a Hugging Face cache whose layer here is a ``MixerCacheLayer``; updated in place.
        past_key_values: the same, under the name transformers gave it before 5.24.
        valid_BT: False at padding.
        resets_BT: True where a packed document begins.
        position_embeddings: (cos, sin) as the decoder hands them to attention; read with ``rope: keep`` alone.
    """
    memory = cache_layer(past_key_values if cache is None else cache, mixer.layer_idx)
    heads_BTI = _heads(mixer, hidden_states, valid_BT, resets_BT, memory, position_embeddings)
    return mixer.out_proj(heads_BTI.to(hidden_states.dtype)), None


def head_outputs_of(
    mixer: OfTerms,
    hidden_BTD: Tensor,
    *,
    valid_BT: Tensor | None = None,
    resets_BT: Tensor | None = None,
    position_embeddings: Rotation | None = None,
) -> Tensor:
    """(B, T, H·P): what the heads make and the output projection reads; fp32."""
    return _heads(mixer, hidden_BTD, valid_BT, resets_BT, None, position_embeddings)


def matrix_of(
    mixer: OfTerms,
    hidden_BTD: Tensor,
    *,
    valid_BT: Tensor | None = None,
    resets_BT: Tensor | None = None,
    position_embeddings: Rotation | None = None,
) -> Tensor:
    """The (B, H, T, T) matrix that takes the terms' values to what they make of them; fp32, zeros at padding."""
    terms, _ = mixer._terms(hidden_BTD, valid_BT, resets_BT, None, position_embeddings)
    # A bias of the convolution makes a query of padding too, and D passes it on; nobody reads what comes of it.
    return between_tokens(terms.matrix(resets_BT=resets_BT), valid_BT)


def factors_of(
    mixer: OfTerms,
    hidden_BTD: Tensor,
    *,
    valid_BT: Tensor | None = None,
    resets_BT: Tensor | None = None,
    position_embeddings: Rotation | None = None,
) -> MatrixFactors:
    """What :func:`matrix_of` is made of, which grows with T and not with T²; of terms that have such factors.

    Borders of documents and the zeros at padding are not in it.
    """
    terms, _ = mixer._terms(hidden_BTD, valid_BT, resets_BT, None, position_embeddings)
    return terms.factors(resets_BT=resets_BT)


def remembered_bytes(mixer: OfTerms, dtype: torch.dtype) -> int:
    """Bytes remembered per sequence in a model of ``dtype``: the heads' states and the convolution's inputs."""
    return bytes_with_inputs(mixer.inner * mixer.state_dim, mixer.conv1d, dtype)


def cache_layer(cache: Any, layer_idx: int) -> MixerCacheLayer | None:
    """This layer's part of a Hugging Face cache; ``distill.student`` puts it there before the decoder runs."""
    if cache is None:
        return None
    layer = cache.layers[layer_idx]
    assert isinstance(layer, MixerCacheLayer), f"cache layer {layer_idx} is a {type(layer).__name__}"
    return layer


def _heads(
    mixer: OfTerms,
    hidden_BTD: Tensor,
    valid_BT: Tensor | None,
    resets_BT: Tensor | None,
    memory: MixerCacheLayer | None,
    rotation: Rotation | None,
) -> Tensor:
    """(B, T, H·P), behind the gate; fp32. ``memory`` is brought up to date."""
    terms, z_BTI = mixer._terms(hidden_BTD, valid_BT, resets_BT, memory, rotation)
    return mixer.gated(terms.run(resets_BT=resets_BT, cache=memory).flatten(2), z_BTI)
