"""MOHAWK's Mamba-2: the step size is gone, and at the start convolution and gate let everything through.

========  =============================================================================
symbol    meaning
========  =============================================================================
u         hidden state that enters the layer (D numbers)
x, B, C   value, what is written with, what is read with: V, K, Q of linear attention
z         gate, with a bias that opens it
a'        the decay's logit, per head and position
H, P, N   heads (the teacher's query heads), channels a head, state size a head
========  =============================================================================

::

    xBC | z | a' = W_in u
    x | B | C    = conv(xBC)                          (no activation)
    B_t, C_t     = R_t B_t, R_t C_t                   (with rope: keep alone; distill.mixers.rotary)
    S_t          = exp(−softplus(a'_t)) S_{t−1} + x_t ⊗ B_t
    y_t          = S_t C_t + D x_t
    out          = W_out ( y ∘ SiLU(z + z_bias) )     (no norm)

Source: MOHAWK (arXiv 2408.10189), section 3 and appendix; the authors run it through the stock kernel as
``x / softplus(a')``, which is infinite in bf16 below a' ≈ −89. Here the scan takes decay and input apart, so
nothing is divided.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.mixers.face import (
    factors_of,
    head_outputs_of,
    matrix_of,
    mix_over_time,
    remembered_bytes,
)
from distill.mixers.parts import (
    ShortConvolution,
    consecutive,
    inverse_softplus,
    mask_positions,
    random_projections_,
    split_heads,
    widen,
)
from distill.mixers.rotary import Rope, Rotation, rotate
from distill.mixers.state_space import ScanTerms

OPEN_GATE = 1.278464542761074  # SiLU(OPEN_GATE) = 1


class DiscreteMamba2Mixer(nn.Module):
    """MOHAWK's mixer with the call signature of an attention layer.

    Args:
        hidden_size: D.
        n_heads: H.
        head_dim: P; H·P need not equal D.
        state_dim: N.
        conv_width: taps of the short convolution.
        norm_eps: accepted and not used, so that every mixer is built by one call.
        out_bias: give the output projection a bias, for teachers whose attention has one.
        rope: ``keep`` turns B and C by the positions' angles (``distill.mixers.rotary``), ``drop`` does not.
        layer_idx: place in the decoder, for the cache.

    Attributes:
        projections_frozen: no gradient passes x, B and C on their way back to the rows of ``in_proj`` that make them.
    """

    projections_frozen = False
    of_attention = False
    kept_heads = ()
    without_factors = None

    forward = mix_over_time
    head_outputs = head_outputs_of
    mixing_matrix = matrix_of
    matrix_factors = factors_of
    state_bytes = remembered_bytes

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
        self.n_heads, self.head_dim, self.state_dim = n_heads, head_dim, state_dim
        self.rope, self.layer_idx = rope, layer_idx
        self.inner, self.wide = n_heads * head_dim, n_heads * state_dim
        self.in_proj = nn.Linear(hidden_size, 2 * self.inner + 2 * self.wide + n_heads, bias=False)
        self.conv1d = ShortConvolution(self.inner + 2 * self.wide, conv_width)
        self.z_bias = nn.Parameter(torch.empty(self.inner))
        self.A_log_bias = nn.Parameter(torch.empty(n_heads))
        self.D = nn.Parameter(torch.empty(n_heads))
        self.out_proj = nn.Linear(self.inner, hidden_size, bias=out_bias)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Random projections; gate and convolution let everything through; memories of 4 to 256 positions."""
        random_projections_(self)
        self.in_proj.weight[self.in_rows()["z"]].zero_()
        nn.init.constant_(self.z_bias, OPEN_GATE)
        self.conv1d.open_()
        nn.init.ones_(self.D)
        set_memory_(self, torch.logspace(2, 8, self.n_heads, base=2))

    @torch.no_grad()
    def scale_reads_(self, factor_H: Tensor) -> None:
        """Multiply every head's C, and with it the head's whole matrix, by a factor."""
        factor_I = factor_H.repeat_interleave(self.state_dim)
        self.in_proj.weight[self.in_rows()["C"]] *= factor_I[:, None]
        assert self.conv1d.bias is not None
        self.conv1d.bias[self.in_rows()["C"]] *= factor_I

    def matrix_parameters(self) -> list[nn.Parameter]:
        """What shapes :meth:`mixing_matrix`: of ``in_proj`` the rows of B, C and A_log; others' gradient is 0."""
        return [*self.in_proj.parameters(), *self.conv1d.parameters(), self.A_log_bias, self.D]

    def in_rows(self) -> dict[str, slice]:
        """Which rows of ``in_proj`` make what."""
        return consecutive({"x": self.inner, "B": self.wide, "C": self.wide, "z": self.inner, "A_log": self.n_heads})

    def gated(self, y_BTI: Tensor, z_BTI: Tensor) -> Tensor:
        """What the heads made, (B, T, H·P), behind the gate; fp32."""
        return y_BTI * F.silu(widen(z_BTI) + widen(self.z_bias))

    def _terms(
        self,
        hidden_BTD: Tensor,
        valid_BT: Tensor | None,
        resets_BT: Tensor | None,
        cache: Any,
        rotation: Rotation | None = None,
    ) -> tuple[ScanTerms, Tensor]:
        projected_BTE = mask_positions(self.in_proj(hidden_BTD), valid_BT)
        xBC_BTC, z_BTI, logit_BTH = projected_BTE.split([self.inner + 2 * self.wide, self.inner, self.n_heads], dim=-1)
        if self.projections_frozen:
            xBC_BTC = xBC_BTC.detach()
        xBC_BTC = self.conv1d(xBC_BTC, valid_BT=valid_BT, resets_BT=resets_BT, cache=cache)
        x_BTI, B_BTI, C_BTI = xBC_BTC.split([self.inner, self.wide, self.wide], dim=-1)
        B_BTHN, C_BTHN = split_heads(B_BTI, self.n_heads), split_heads(C_BTI, self.n_heads)
        if self.rope == "keep":
            B_BTHN, C_BTHN = rotate(B_BTHN, C_BTHN, rotation)
        log_decay_BTH = -F.softplus(widen(logit_BTH) + widen(self.A_log_bias))
        terms = ScanTerms(
            x_BTHP=split_heads(mask_positions(x_BTI, valid_BT), self.n_heads),
            B_BTHN=B_BTHN,
            C_BTHN=C_BTHN,
            log_decay_BTH=mask_positions(log_decay_BTH, valid_BT),
            step_BTH=None,
            skip_H=self.D,
        )
        return terms, z_BTI


@torch.no_grad()
def set_memory_(mixer: DiscreteMamba2Mixer, positions_H: Tensor) -> None:
    """Let every head forget by 1/e in ``positions_H`` positions, whatever the input."""
    mixer.in_proj.weight[mixer.in_rows()["A_log"]].zero_()
    mixer.A_log_bias.copy_(inverse_softplus(1 / positions_H))
