"""Gated DeltaNet, shaped to take attention's place head by head.

========  =============================================================================
symbol    meaning
========  =============================================================================
u         hidden state that enters the layer (D numbers)
q, k, v   query, key, value: what attention calls so
z         gate
b, a      of which β and α are made, per head
H, P, N   heads (the teacher's query heads), channels of a value, of a query and a key
========  =============================================================================

::

    q | k | v | z | b | a = W_in u
    q | k | v    = SiLU(conv(q | k | v))
    q_t, k_t     = R_t q_t, R_t k_t                   (with rope: keep alone; distill.mixers.rotary)
    q_t, k_t     = N^-½ q_t / |q_t|, k_t / |k_t|
    β, α         = σ(b), exp(−exp(A_log) softplus(a + dt_bias))
    S_t          = α_t S_{t−1} (I − β_t k_t k_tᵀ) + β_t v_t k_tᵀ
    y_t          = S_t q_t                            (distill.delta)
    out          = W_out ( w ∘ RMS_head(y) ∘ SiLU(z) )

Where a state-space layer adds what it writes to what stands under the same key, this one puts it in its place: β = 1
makes a later value of a key replace the earlier one.

Source: Gated Delta Networks (arXiv 2412.06464). The equations are those of transformers' ``Qwen3NextGatedDeltaNet``
with as many key heads as value heads, so its weights can be written from these: ``conv1d.weight`` (channels q | k | v),
``A_log`` and ``dt_bias`` as they are; ``in_proj_qkvz`` takes the rows of q, k, v and z head by head, ``in_proj_ba``
those of b and a; its one norm weight for all heads is 1, and w goes into the columns of ``out_proj``. What it has not:
a bias in convolution or output projection (here only where the teacher's attention has them), and rotary positions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.cache import MixerCacheLayer
from distill.delta import delta_matrix, delta_rule, delta_step
from distill.mixers.face import head_outputs_of, matrix_of, mix_over_time, remembered_bytes
from distill.mixers.parts import (
    GatedHeadNorm,
    ShortConvolution,
    consecutive,
    inverse_softplus,
    mask_positions,
    random_projections_,
    split_heads,
    through_cache,
    widen,
)
from distill.mixers.rotary import Rope, Rotation, rotate

LENGTH_EPS = 1e-6
"""Added to the square of a key's or query's length."""


@dataclass(frozen=True)
class DeltaTerms:
    """Everything ``y = M v`` needs, per position.

    Attributes:
        log_decay_BTH: logarithm of α, ≤ 0; 0 at padding.
        beta_BTH: β; 0 at padding.
        k_BTHN, q_BTHN: keys of length 1, and queries.
        v_BTHP: values.
    """

    log_decay_BTH: Tensor
    beta_BTH: Tensor
    k_BTHN: Tensor
    q_BTHN: Tensor
    v_BTHP: Tensor

    @property
    def values(self) -> Tensor:
        """v_BTHP."""
        return self.v_BTHP

    def run(self, *, resets_BT: Tensor | None, cache: MixerCacheLayer | None) -> Tensor:
        """y_BTHP in fp32. With a cache it continues from the state there, and brings that up to date."""
        v_BTHP = widen(self.v_BTHP)
        inputs = self.log_decay_BTH, self.beta_BTH, self.k_BTHN, self.q_BTHN, v_BTHP

        def step(state_BHPN: Tensor) -> Tensor:
            log_decay_BH, beta_BH, k_BHN, q_BHN, v_BHP = (tensor[:, 0] for tensor in inputs)
            return delta_step(log_decay_BH, beta_BH, k_BHN, q_BHN, v_BHP, state_BHPN)

        return through_cache(
            cache,
            inputs,
            resets_BT,
            step,
            lambda state_BHPN: delta_rule(*inputs, initial_state_BHPN=state_BHPN, resets_BT=resets_BT),
        )

    def matrix(self, *, resets_BT: Tensor | None) -> Tensor:
        """M, (B, H, T, T), fp32."""
        with torch.autocast(self.v_BTHP.device.type, enabled=False):
            inputs = (widen(tensor) for tensor in (self.log_decay_BTH, self.beta_BTH, self.k_BTHN, self.q_BTHN))
            return delta_matrix(*inputs, resets_BT=resets_BT)


class GatedDeltaNetMixer(nn.Module):
    """Gated DeltaNet with the call signature of an attention layer.

    Args:
        hidden_size: D.
        n_heads: H.
        head_dim: P; H·P need not equal D.
        state_dim: N.
        conv_width: taps of the short convolution.
        conv_bias: give it a bias, for teachers whose q, k or v have one.
        norm_eps: added to the mean square in the norm.
        out_bias: give the output projection a bias, for teachers whose attention has one.
        rope: ``keep`` turns q and k by the positions' angles (``distill.mixers.rotary``), ``drop`` does not.
        layer_idx: place in the decoder, for the cache.

    Attributes:
        projections_frozen: no gradient passes q, k and v on their way back to the rows of ``in_proj`` that make them.
        without_factors: why its matrix has none.
    """

    projections_frozen = False
    of_attention = False
    kept_heads = ()
    without_factors = "the delta rule's matrix holds an inverse that couples all positions, and has no factors"

    forward = mix_over_time
    head_outputs = head_outputs_of
    mixing_matrix = matrix_of
    state_bytes = remembered_bytes

    def __init__(
        self,
        *,
        hidden_size: int,
        n_heads: int,
        head_dim: int,
        state_dim: int,
        conv_width: int = 4,
        conv_bias: bool = False,
        norm_eps: float = 1e-5,
        out_bias: bool = False,
        rope: Rope = "drop",
        layer_idx: int = 0,
    ) -> None:
        super().__init__()
        self.n_heads, self.head_dim, self.state_dim = n_heads, head_dim, state_dim
        self.rope, self.layer_idx = rope, layer_idx
        self.inner, self.wide = n_heads * head_dim, n_heads * state_dim
        self.in_proj = nn.Linear(hidden_size, 2 * self.wide + 2 * self.inner + 2 * n_heads, bias=False)
        self.conv1d = ShortConvolution(2 * self.wide + self.inner, conv_width, bias=conv_bias)
        self.dt_bias = nn.Parameter(torch.empty(n_heads))
        self.A_log = nn.Parameter(torch.empty(n_heads))
        self.norm = GatedHeadNorm(self.inner, n_heads, norm_eps, norm_first=True)
        self.out_proj = nn.Linear(self.inner, hidden_size, bias=out_bias)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Random projections, an open convolution, β = ½, memories of 4 to 256 positions spread over the heads."""
        random_projections_(self)
        self.conv1d.open_()
        nn.init.ones_(self.norm.weight)
        self.in_proj.weight[self.in_rows()["b"]].zero_()
        set_memory_(self, torch.logspace(2, 8, self.n_heads, base=2))

    def in_rows(self) -> dict[str, slice]:
        """Which rows of ``in_proj`` make what."""
        wide, inner, heads = self.wide, self.inner, self.n_heads
        return consecutive({"q": wide, "k": wide, "v": inner, "z": inner, "b": heads, "a": heads})

    def gated(self, y_BTI: Tensor, z_BTI: Tensor) -> Tensor:
        """What the heads made, (B, T, H·P), normed, and behind the gate; fp32."""
        return self.norm(y_BTI, z_BTI)

    def _terms(
        self,
        hidden_BTD: Tensor,
        valid_BT: Tensor | None,
        resets_BT: Tensor | None,
        cache: MixerCacheLayer | None,
        rotation: Rotation | None = None,
    ) -> tuple[DeltaTerms, Tensor]:
        projected_BTE = mask_positions(self.in_proj(hidden_BTD), valid_BT)
        qkv_BTC, z_BTI, b_BTH, a_BTH = projected_BTE.split(
            [2 * self.wide + self.inner, self.inner, self.n_heads, self.n_heads], dim=-1
        )
        if self.projections_frozen:
            qkv_BTC = qkv_BTC.detach()
        qkv_BTC = F.silu(self.conv1d(qkv_BTC, valid_BT=valid_BT, resets_BT=resets_BT, cache=cache))
        q_BTI, k_BTI, v_BTI = qkv_BTC.split([self.wide, self.wide, self.inner], dim=-1)
        q_BTHN, k_BTHN = split_heads(q_BTI, self.n_heads), split_heads(k_BTI, self.n_heads)
        if self.rope == "keep":
            k_BTHN, q_BTHN = rotate(k_BTHN, q_BTHN, rotation)
        log_decay_BTH = -widen(self.A_log).exp() * F.softplus(widen(a_BTH) + widen(self.dt_bias))
        terms = DeltaTerms(
            log_decay_BTH=mask_positions(log_decay_BTH, valid_BT),
            beta_BTH=mask_positions(widen(b_BTH).sigmoid(), valid_BT),
            k_BTHN=_of_length_1(k_BTHN),
            q_BTHN=_of_length_1(q_BTHN) * self.state_dim**-0.5,
            v_BTHP=split_heads(v_BTI, self.n_heads),
        )
        return terms, z_BTI


def _of_length_1(x_BTHN: Tensor) -> Tensor:
    """In fp32: a key that is too long by the rounding of bf16 lets a state grow."""
    x_BTHN = widen(x_BTHN)
    return x_BTHN * torch.rsqrt(x_BTHN.square().sum(-1, keepdim=True) + LENGTH_EPS)


@torch.no_grad()
def set_memory_(mixer: GatedDeltaNetMixer, positions_H: Tensor) -> None:
    """Let every head forget by 1/e in ``positions_H`` positions, whatever the input."""
    mixer.in_proj.weight[mixer.in_rows()["a"]].zero_()
    mixer.dt_bias.copy_(inverse_softplus(torch.ones_like(mixer.dt_bias)))
    mixer.A_log.copy_(-positions_H.log())
