"""The standard Mamba-2 layer, shaped to take attention's place head by head.

========  =============================================================================
symbol    meaning
========  =============================================================================
u         hidden state that enters the layer (D numbers)
z         gate
x, B, C   value, what is written with, what is read with: V, K, Q of linear attention
Δ         step size, per head; A = −exp(A_log) < 0 per head
H, P, N   heads (the teacher's query heads), channels a head, state size a head
========  =============================================================================

::

    z | xBC | Δ' = W_in u
    x | B | C    = SiLU(conv(xBC))
    B_t, C_t     = R_t B_t, R_t C_t                   (with rope: keep alone; distill.mixers.rotary)
    Δ            = softplus(Δ' + Δ_bias)
    S_t          = exp(Δ_t A) S_{t−1} + Δ_t x_t ⊗ B_t
    y_t          = S_t C_t + D x_t
    out          = W_out ( w ∘ RMS_head( y ∘ SiLU(z) ) )

Source: "Transformers are SSMs" (arXiv 2405.21060), section 7. One B/C group per head and the gated norm taken per
head make every head independent, as attention's heads are. Parameter names and layouts are those of mamba-ssm and of
transformers' Bamba and GraniteMoeHybrid, which therefore can run a student's weights.
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
    GatedHeadNorm,
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


class Mamba2Mixer(nn.Module):
    """Mamba-2 with the call signature of an attention layer.

    Args:
        hidden_size: D.
        n_heads: H.
        head_dim: P; H·P need not equal D.
        state_dim: N.
        conv_width: taps of the short convolution.
        norm_eps: added to the mean square in the gated norm.
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
        self.dt_bias = nn.Parameter(torch.empty(n_heads))
        self.A_log = nn.Parameter(torch.empty(n_heads))
        self.D = nn.Parameter(torch.empty(n_heads))
        self.norm = GatedHeadNorm(self.inner, n_heads, norm_eps)
        self.out_proj = nn.Linear(self.inner, hidden_size, bias=out_bias)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Random projections, an open convolution, memories of 4 to 256 positions spread over the heads."""
        random_projections_(self)
        self.conv1d.open_()
        nn.init.ones_(self.norm.weight)
        nn.init.ones_(self.D)
        set_memory_(self, torch.logspace(2, 8, self.n_heads, base=2))

    def matrix_parameters(self) -> list[nn.Parameter]:
        """What shapes :meth:`mixing_matrix`: of ``in_proj`` the rows of B, C and dt; others' gradient is 0."""
        return [*self.in_proj.parameters(), *self.conv1d.parameters(), self.dt_bias, self.A_log, self.D]

    def in_rows(self) -> dict[str, slice]:
        """Which rows of ``in_proj`` make what."""
        return consecutive({"z": self.inner, "x": self.inner, "B": self.wide, "C": self.wide, "dt": self.n_heads})

    def gated(self, y_BTI: Tensor, z_BTI: Tensor) -> Tensor:
        """What the heads made, (B, T, H·P), behind the gated norm; fp32."""
        return self.norm(y_BTI, z_BTI)

    def _terms(
        self,
        hidden_BTD: Tensor,
        valid_BT: Tensor | None,
        resets_BT: Tensor | None,
        cache: Any,
        rotation: Rotation | None = None,
    ) -> tuple[ScanTerms, Tensor]:
        projected_BTE = mask_positions(self.in_proj(hidden_BTD), valid_BT)
        z_BTI, xBC_BTC, dt_BTH = projected_BTE.split([self.inner, self.inner + 2 * self.wide, self.n_heads], dim=-1)
        if self.projections_frozen:
            xBC_BTC = xBC_BTC.detach()
        xBC_BTC = F.silu(self.conv1d(xBC_BTC, valid_BT=valid_BT, resets_BT=resets_BT, cache=cache))
        x_BTI, B_BTI, C_BTI = xBC_BTC.split([self.inner, self.wide, self.wide], dim=-1)
        B_BTHN, C_BTHN = split_heads(B_BTI, self.n_heads), split_heads(C_BTI, self.n_heads)
        if self.rope == "keep":
            B_BTHN, C_BTHN = rotate(B_BTHN, C_BTHN, rotation)
        step_BTH = mask_positions(F.softplus(widen(dt_BTH) + widen(self.dt_bias)), valid_BT)
        rate_H = -widen(self.A_log).exp()
        terms = ScanTerms(
            x_BTHP=split_heads(mask_positions(x_BTI, valid_BT), self.n_heads),
            B_BTHN=B_BTHN,
            C_BTHN=C_BTHN,
            log_decay_BTH=step_BTH * rate_H,
            step_BTH=step_BTH,
            skip_H=self.D,
            rate_H=rate_H,
        )
        return terms, z_BTI


@torch.no_grad()
def set_memory_(mixer: Mamba2Mixer, positions_H: Tensor) -> None:
    """Let every head forget by 1/e in ``positions_H`` positions, at step size 1 whatever the input."""
    mixer.in_proj.weight[mixer.in_rows()["dt"]].zero_()
    mixer.dt_bias.copy_(inverse_softplus(torch.ones_like(mixer.dt_bias)))
    mixer.A_log.copy_(-positions_H.log())
