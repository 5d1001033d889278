"""Linear attention whose rows sum to one, as a softmax's do: the terms that BASED and Hedgehog have in common.

========  =============================================================================
symbol    meaning
========  =============================================================================
φ(q), φ(k)  features of query and key, N numbers a head, whose products are never below zero
v, a      value, decay
========  =============================================================================

::

    S_t, n_t     = a_t S_{t−1} + v_t ⊗ φ(k_t),  a_t n_{t−1} + φ(k_t)
    y_t          = S_t φ(q_t) / (n_t · φ(q_t))
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from distill.cache import MixerCacheLayer
from distill.mixers.parts import ShortConvolution, bytes_with_inputs, mask_positions, split_heads, widen
from distill.mixers.rotary import Rope, Rotation, rotate
from distill.mixers.state_space import ScanTerms
from distill.ssd import scan
from distill.ssd.factors import MatrixFactors

LEAST = 1e-18
"""For sums of nothing, as padding before the first token reads, which must not become NaN.

All summands are ≥ 0, so small sums are as exact as large ones and need no more: BASED's are ≥ ½, Hedgehog's as small as
its features are spiky. A derivative divides by it twice, so its square has to be a number of fp32 (1e-20's inverse
squared is not).
"""


@dataclass(frozen=True)
class NormalisedTerms:
    """Everything ``y = M v`` needs, per position.

    Attributes:
        k_BTHN: φ of the keys; 0 at padding.
        q_BTHN: φ of the queries.
        v_BTHP: values.
        log_decay_BTH: logarithm of a, ≤ 0; 0 at padding.
    """

    k_BTHN: Tensor
    q_BTHN: Tensor
    v_BTHP: Tensor
    log_decay_BTH: Tensor

    @property
    def values(self) -> Tensor:
        """v_BTHP."""
        return self.v_BTHP

    def run(self, *, resets_BT: Tensor | None, cache: MixerCacheLayer | None) -> Tensor:
        """y_BTHP in fp32. With a cache it continues from the state there, and brings that up to date."""
        v_BTHP = widen(self.v_BTHP)
        counted_BTHP = torch.cat([v_BTHP, torch.ones_like(v_BTHP[..., :1])], dim=-1)  # S and n are one state
        y_BTHP = self._scan(counted_BTHP, self.q_BTHN).run(resets_BT=resets_BT, cache=cache)
        return y_BTHP[..., :-1] / y_BTHP[..., -1:].clamp_min(LEAST)

    def matrix(self, *, resets_BT: Tensor | None) -> Tensor:
        """M, (B, H, T, T), fp32; every row sums to 1."""
        return self._scan(self.v_BTHP, self._read(resets_BT)).matrix(resets_BT=resets_BT)

    def factors(self, *, resets_BT: Tensor | None) -> MatrixFactors:
        """What :meth:`matrix` is made of: a row's sum is a number for what reads it."""
        return MatrixFactors(self.log_decay_BTH, self.k_BTHN, self._read(resets_BT))

    def _scan(self, x_BTHP: Tensor, q_BTHN: Tensor) -> ScanTerms:
        no_skip_H = x_BTHP.new_zeros(x_BTHP.shape[2])
        return ScanTerms(x_BTHP, self.k_BTHN, q_BTHN, self.log_decay_BTH, step_BTH=None, skip_H=no_skip_H)

    def _read(self, resets_BT: Tensor | None) -> Tensor:
        ones_BTH1 = torch.ones_like(self.k_BTHN[..., :1])
        sum_BTH1, _ = scan(self.log_decay_BTH, self.k_BTHN, self.q_BTHN, ones_BTH1, resets_BT=resets_BT)
        return self.q_BTHN / sum_BTH1.clamp_min(LEAST)


class Normalised(Protocol):
    """A mixer of such terms, as far as the functions of this file look at it.

    Attributes:
        n_heads, head_dim: H, P.
        state_dim: N, features of a query or a key.
        inner, wide: H·P, and H·d where a query has d numbers before φ.
        rope: whether q and k are turned.
        projections_frozen: no gradient passes q, k and v on their way back.
        conv1d: over q | k | v.
    """

    n_heads: int
    head_dim: int
    state_dim: int
    inner: int
    wide: int
    rope: Rope
    projections_frozen: bool
    conv1d: ShortConvolution


def normalised_terms(
    mixer: Normalised,
    qkv_BTC: Tensor,
    log_decay_BTH: Tensor,
    features: Callable[[Tensor], Tensor],
    *,
    valid_BT: Tensor | None,
    resets_BT: Tensor | None,
    cache: MixerCacheLayer | None,
    rotation: Rotation | None,
) -> tuple[NormalisedTerms, Tensor]:
    """Terms of q | k | v as ``in_proj`` makes them, and v_BTI: convolved, turned with ``rope: keep``, and q and k φ.

    Args:
        qkv_BTC: C = 2·H·d + H·P.
        log_decay_BTH: logarithm of a, 0 at padding.
        features: φ, (B, T, H, d) to (B, T, H, N).
        valid_BT: False at padding.
        resets_BT: True where a packed document begins.
        cache: gives the convolution its past.
        rotation: (cos, sin) as the decoder hands them to its layers.

    Raises:
        ValueError: with ``rope: keep``, as ``distill.mixers.rotary.rotate``.
    """
    if mixer.projections_frozen:
        qkv_BTC = qkv_BTC.detach()
    qkv_BTC = mixer.conv1d(qkv_BTC, valid_BT=valid_BT, resets_BT=resets_BT, cache=cache)
    q_BTI, k_BTI, v_BTI = qkv_BTC.split([mixer.wide, mixer.wide, mixer.inner], dim=-1)
    q_BTHD, k_BTHD = split_heads(q_BTI, mixer.n_heads), split_heads(k_BTI, mixer.n_heads)
    if mixer.rope == "keep":
        k_BTHD, q_BTHD = rotate(k_BTHD, q_BTHD, rotation)
    k_BTHN = mask_positions(features(k_BTHD).flatten(2), valid_BT).unflatten(2, (mixer.n_heads, -1))
    return NormalisedTerms(k_BTHN, features(q_BTHD), split_heads(v_BTI, mixer.n_heads), log_decay_BTH), v_BTI


def normalised_bytes(mixer: Normalised, dtype: torch.dtype) -> int:
    """Bytes remembered per sequence in a model of ``dtype``: S and n of every head, and the convolution's inputs."""
    return bytes_with_inputs(mixer.n_heads * (mixer.head_dim + 1) * mixer.state_dim, mixer.conv1d, dtype)
