"""Linear attention through the second-order Taylor series of the exponential, as BASED has it.

========  =============================================================================
symbol    meaning
========  =============================================================================
u         hidden state that enters the layer (D numbers)
q, k, v   query, key, value: what attention calls so
H, P, d   heads (the teacher's query heads), channels of a value, of a query and a key
N         features: 1 + d + d (d + 1) / 2, state size a head and channel
========  =============================================================================

::

    q | k | v    = conv(W_in u)                       (no activation)
    q_t, k_t     = R_t q_t, R_t k_t                   (with rope: keep alone; distill.mixers.rotary)
    φ(x)         = ( 1,  x_i,  x_i x_j √2^[i<j] / √2 ) for i ≤ j
    φ(q) · φ(k)  = 1 + q · k + (q · k)² / 2           ≈ exp(q · k), and never below ½
    S_t, n_t     = S_{t−1} + v_t ⊗ φ(k_t),  n_{t−1} + φ(k_t)
    y_t          = S_t φ(q_t) / (n_t · φ(q_t))        softmax attention with the series in the exponential's place
    out          = W_out y

The quotient is ``distill.mixers.normalised``'s. Nothing decays and nothing is gated, so a layer whose q and k are its
teacher's starts as the teacher's attention as far as the series goes. Its state is the largest here: at d = 16 it has
153 × (P + 1) numbers a head.

Source: "Simple linear attention language models balance the recall-throughput tradeoff" (arXiv 2402.18668), section 4.
Its models have layers of sliding-window attention among these: ``window_layers`` of ``distill.convert`` and
``student.window_layers`` of a recipe put some. The features x_i x_j and x_j x_i are one, which halves its state.
"""

import torch
from torch import Tensor, nn

from distill.cache import MixerCacheLayer
from distill.mixers.face import factors_of, head_outputs_of, matrix_of, mix_over_time
from distill.mixers.normalised import NormalisedTerms, normalised_bytes, normalised_terms
from distill.mixers.parts import ShortConvolution, consecutive, mask_positions, random_projections_, widen
from distill.mixers.rotary import Rope, Rotation


def n_features(d: int) -> int:
    """N."""
    return 1 + d + d * (d + 1) // 2


def taylor(x_BTHD: Tensor) -> Tensor:
    """φ, (B, T, H, N), in fp32."""
    x_BTHD = widen(x_BTHD)
    first, second = torch.triu_indices(x_BTHD.shape[-1], x_BTHD.shape[-1], device=x_BTHD.device)
    weight_E = torch.where(first == second, x_BTHD.new_tensor(0.5).sqrt(), x_BTHD.new_tensor(1.0))
    products_BTHE = x_BTHD[..., first] * x_BTHD[..., second] * weight_E
    return torch.cat([torch.ones_like(x_BTHD[..., :1]), x_BTHD, products_BTHE], dim=-1)


class BasedMixer(nn.Module):
    """BASED's linear attention with the call signature of an attention layer.

    Args:
        hidden_size: D.
        n_heads: H.
        head_dim: P; H·P need not equal D.
        state_dim: d; the state has N = 1 + d + d (d + 1) / 2 numbers for each channel.
        conv_width: taps of the short convolution.
        norm_eps: accepted and not used, so that every mixer is built by one call.
        out_bias: give the output projection a bias, for teachers whose attention has one.
        rope: ``keep`` turns q and k by the positions' angles (``distill.mixers.rotary``), ``drop`` does not.
        layer_idx: place in the decoder, for the cache.

    Attributes:
        state_dim: N.
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
        self.n_heads, self.head_dim, self.score_dim = n_heads, head_dim, state_dim
        self.state_dim = n_features(state_dim)
        self.rope, self.layer_idx = rope, layer_idx
        self.inner, self.wide = n_heads * head_dim, n_heads * state_dim
        self.in_proj = nn.Linear(hidden_size, 2 * self.wide + self.inner, bias=False)
        self.conv1d = ShortConvolution(2 * self.wide + self.inner, conv_width)
        self.out_proj = nn.Linear(self.inner, hidden_size, bias=out_bias)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Random projections, an open convolution; scores of q and k about 1 in size."""
        random_projections_(self)
        self.in_proj.weight[: 2 * self.wide] *= self.score_dim**-0.25
        self.conv1d.open_()

    def matrix_parameters(self) -> list[nn.Parameter]:
        """What shapes :meth:`mixing_matrix`: of ``in_proj`` the rows of q and k; others' gradient is 0."""
        return [*self.in_proj.parameters(), *self.conv1d.parameters()]

    def in_rows(self) -> dict[str, slice]:
        """Which rows of ``in_proj`` make what."""
        return consecutive({"q": self.wide, "k": self.wide, "v": self.inner})

    def gated(self, y_BTI: Tensor, _nothing: Tensor) -> Tensor:
        """What the heads made, (B, T, H·P), as it is."""
        return y_BTI

    def _terms(
        self,
        hidden_BTD: Tensor,
        valid_BT: Tensor | None,
        resets_BT: Tensor | None,
        cache: MixerCacheLayer | None,
        rotation: Rotation | None = None,
    ) -> tuple[NormalisedTerms, Tensor]:
        qkv_BTC = mask_positions(self.in_proj(hidden_BTD), valid_BT)
        nothing_forgotten_BTH = widen(qkv_BTC).new_zeros(*qkv_BTC.shape[:2], self.n_heads)
        return normalised_terms(
            self,
            qkv_BTC,
            nothing_forgotten_BTH,
            taylor,
            valid_BT=valid_BT,
            resets_BT=resets_BT,
            cache=cache,
            rotation=rotation,
        )
