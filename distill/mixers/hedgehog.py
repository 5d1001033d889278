"""Linear attention through softmax features, as Hedgehog has it, with a decay.

========  =============================================================================
symbol    meaning
========  =============================================================================
u         hidden state that enters the layer (D numbers)
q, k, v   query, key, value: what attention calls so
a'        the decay's logit, per head and position
H, P, d   heads (the teacher's query heads), channels of a value, of a query and a key
========  =============================================================================

::

    q | k | v | a' = W_in u
    q | k | v    = conv(q | k | v)                    (no activation)
    q_t, k_t     = R_t q_t, R_t k_t                   (with rope: keep alone; distill.mixers.rotary)
    φ(x)         = ( softmax(c x), softmax(−c x) )    2 d features
    a_t          = exp(−softplus(a'_t))
    S_t, n_t     = a_t S_{t−1} + v_t ⊗ φ(k_t),  a_t n_{t−1} + φ(k_t)
    y_t          = S_t φ(q_t) / (n_t · φ(q_t))        (distill.mixers.normalised)
    out          = W_out y

A state-space layer's scores are bilinear in what it reads, so whatever looks like a key answers with it; these features
are spikes, and only what is a key answers. That is what a head that looks up lives by (docs/experiments.md).

Source: "The Hedgehog & the Porcupine" (arXiv 2402.04347), section 4; its map of queries and keys before the softmax is
in ``in_proj`` here, before the rotation. The decay is not in the paper: without it layers that look at what stood just
before learn slowly.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.mixers.face import factors_of, head_outputs_of, matrix_of, mix_over_time
from distill.mixers.normalised import NormalisedTerms, normalised_bytes, normalised_terms
from distill.mixers.parts import (
    ShortConvolution,
    consecutive,
    inverse_softplus,
    mask_positions,
    random_projections_,
    widen,
)
from distill.mixers.rotary import Rope, Rotation

SHARPNESS = 2.0
"""c: scores of attention's size make features that prefer some of their numbers, and still let all learn."""


def n_features(d: int) -> int:
    """N."""
    return 2 * d


def spikes(x_BTHD: Tensor) -> Tensor:
    """φ, (B, T, H, 2 d), in fp32; either half sums to one."""
    x_BTHD = SHARPNESS * widen(x_BTHD)
    return torch.cat([x_BTHD.softmax(-1), (-x_BTHD).softmax(-1)], dim=-1)


class HedgehogMixer(nn.Module):
    """Hedgehog's linear attention, with a decay, with the call signature of an attention layer.

    Args:
        hidden_size: D.
        n_heads: H.
        head_dim: P; H·P need not equal D.
        state_dim: d; the state has 2 d numbers for each channel.
        conv_width: taps of the short convolution.
        norm_eps: accepted and not used, so that every mixer is built by one call.
        out_bias: give the output projection a bias, for teachers whose attention has one.
        rope: ``keep`` turns q and k by the positions' angles (``distill.mixers.rotary``), ``drop`` does not.
        layer_idx: place in the decoder, for the cache.

    Attributes:
        state_dim: 2 d.
        projections_frozen: no gradient passes q, k and v on their way back to the rows of ``in_proj`` that make them.
    """

    projections_frozen = False
    of_attention = False
    kept_heads = ()
    without_factors = None

    forward = mix_over_time
    head_outputs = head_outputs_of
    mixing_matrix = matrix_of
    matrix_factors = factors_of
    state_bytes = normalised_bytes

    def __init__(
        self,
        *,
        hidden_size: int,
        n_heads: int,
        head_dim: int,
        state_dim: int,
        conv_width: int = 4,
        norm_eps: float = 1e-5,
        out_bias: bool = False,
        rope: Rope = "drop",
        layer_idx: int = 0,
    ) -> None:
        super().__init__()
        self.n_heads, self.head_dim, self.state_dim = n_heads, head_dim, n_features(state_dim)
        self.rope, self.layer_idx = rope, layer_idx
        self.inner, self.wide = n_heads * head_dim, n_heads * state_dim
        self.in_proj = nn.Linear(hidden_size, 2 * self.wide + self.inner + n_heads, bias=False)
        self.conv1d = ShortConvolution(2 * self.wide + self.inner, conv_width)
        self.A_log_bias = nn.Parameter(torch.empty(n_heads))
        self.out_proj = nn.Linear(self.inner, hidden_size, bias=out_bias)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Random projections, an open convolution, memories of 4 to 256 positions."""
        random_projections_(self)
        self.conv1d.open_()
        set_memory_(self, torch.logspace(2, 8, self.n_heads, base=2))

    def matrix_parameters(self) -> list[nn.Parameter]:
        """What shapes :meth:`mixing_matrix`: of ``in_proj`` the rows of q, k and A_log; others' gradient is 0."""
        return [*self.in_proj.parameters(), *self.conv1d.parameters(), self.A_log_bias]

    def in_rows(self) -> dict[str, slice]:
        """Which rows of ``in_proj`` make what."""
        return consecutive({"q": self.wide, "k": self.wide, "v": self.inner, "A_log": self.n_heads})

    def gated(self, y_BTI: Tensor, _nothing: Tensor) -> Tensor:
        """What the heads made, (B, T, H·P), as it is."""
        return y_BTI

    def _terms(
        self,
        hidden_BTD: Tensor,
        valid_BT: Tensor | None,
        resets_BT: Tensor | None,
        cache: Any,
        rotation: Rotation | None = None,
    ) -> tuple[NormalisedTerms, Tensor]:
        projected_BTE = mask_positions(self.in_proj(hidden_BTD), valid_BT)
        qkv_BTC, logit_BTH = projected_BTE.split([2 * self.wide + self.inner, self.n_heads], dim=-1)
        log_decay_BTH = mask_positions(-F.softplus(widen(logit_BTH) + widen(self.A_log_bias)), valid_BT)
        return normalised_terms(
            self, qkv_BTC, log_decay_BTH, spikes, valid_BT=valid_BT, resets_BT=resets_BT, cache=cache, rotation=rotation
        )


@torch.no_grad()
def set_memory_(mixer: HedgehogMixer, positions_H: Tensor) -> None:
    """Let every head forget by 1/e in ``positions_H`` positions, whatever the input."""
    mixer.in_proj.weight[mixer.in_rows()["A_log"]].zero_()
    mixer.A_log_bias.copy_(inverse_softplus(1 / positions_H))
