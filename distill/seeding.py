"""Attention weights become mixer weights: x ← V, B ← K, C ← Q, out ← O.

Linear attention computes Σ_s (q_t · k_s) v_s; a state-space layer computes Σ_s (C_t · B_s) decay x_s. So the teacher's
projections have a place, head by head (MambaInLlama, arXiv 2408.15237); what attention does not have, decay, gate, skip
and convolution, starts where it disturbs least. Keys and values that query heads share are repeated to the query heads.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distill.attention import AttentionView
from distill.mixers import DiscreteMamba2Mixer, Mamba2Mixer


@dataclass(frozen=True)
class Seeded:
    """One row of the conversion report: where a mixer's weights come from."""

    target: str
    source: str


@torch.no_grad()
def seed_mixer(mixer: nn.Module, attention: AttentionView, input_norm: Tensor) -> list[Seeded]:
    """Fill ``mixer`` from ``attention``, in place.

    Args:
        mixer: freshly made, of any class in ``MIXERS``.
        attention: the layer it replaces.
        input_norm: (D,) weight of the norm whose output both read; tells how large each input is.

    Returns:
        What came from where, for the report.
    """
    return SEEDS[type(mixer)](mixer, attention, input_norm)


def _copy_projections(mixer: Mamba2Mixer | DiscreteMamba2Mixer, attention: AttentionView) -> list[Seeded]:
    """The four projections and, where the teacher has them, their biases.

    The scaling of the scores is split evenly between B and C, which keeps both at one size. A bias goes into the
    convolution: its only open tap is the current position's, so W u + b is what the projection would have been.
    """
    half = attention.scaling**0.5
    sources = {"x": (attention.v, 1.0), "B": (attention.k, half), "C": (attention.q, half)}
    rows = mixer.in_rows()
    first = min(rows[name].start for name in sources)
    for name, (projection, scale) in sources.items():
        width = mixer.head_dim if name == "x" else mixer.state_dim
        place = rows[name]
        mixer.in_proj.weight[place] = scale * _heads(projection.weight, attention, width)
        if projection.bias is not None:
            inside = slice(place.start - first, place.stop - first)
            mixer.conv1d.bias[inside] = scale * _heads(projection.bias[:, None], attention, width)[:, 0]
    mixer.out_proj.weight.copy_(attention.o.weight)
    shared = (
        ""
        if attention.n_heads == attention.n_kv_heads
        else f", each repeated {attention.n_heads // attention.n_kv_heads}×"
    )
    return [
        Seeded("in_proj x", f"v{shared}"),
        Seeded("in_proj B", f"k{shared}, × √scaling"),
        Seeded("in_proj C", "q, × √scaling"),
        Seeded("out_proj", "o"),
        Seeded("conv1d", "identity" + (", bias from q, k, v" if attention.q.bias is not None else "")),
    ]


def _heads(weight: Tensor, attention: AttentionView, width: int) -> Tensor:
    """(heads·P, D) to (H·width, D): repeated to the query heads; columns of a wider state start at zero."""
    by_head = weight.unflatten(0, (-1, attention.head_dim))
    if by_head.shape[0] != attention.n_heads:
        by_head = attention.per_query_head(by_head, dim=0)
    out = by_head.new_zeros(attention.n_heads, width, weight.shape[1])
    used = min(width, attention.head_dim)
    out[:, :used] = by_head[:, :used]
    return out.flatten(0, 1)


def _value_size(attention: AttentionView, input_norm: Tensor) -> Tensor:
    """(H,) root mean square of each head's values, for inputs of unit size before the norm's weight."""
    values_HPD = attention.per_query_head(attention.v.weight.unflatten(0, (-1, attention.head_dim)), dim=0)
    return (values_HPD * input_norm).square().sum(-1).mean(-1).sqrt()


def _seed_mamba2(mixer: nn.Module, attention: AttentionView, input_norm: Tensor) -> list[Seeded]:
    assert isinstance(mixer, Mamba2Mixer)
    seeded = _copy_projections(mixer, attention)
    # The gated norm makes every head's output unit size; attention's is about that of the values it averages.
    mixer.norm.weight.copy_(_value_size(attention, input_norm).repeat_interleave(mixer.head_dim))
    nn.init.zeros_(mixer.D)
    return [
        *seeded,
        Seeded("norm", "size of v a head"),
        Seeded("in_proj z", "random"),
        Seeded("D", "0"),
        Seeded("in_proj dt, dt_bias, A_log", "step 1; memories of 4 to 256 positions over the heads"),
    ]


def _seed_discrete_mamba2(mixer: nn.Module, attention: AttentionView, input_norm: Tensor) -> list[Seeded]:
    assert isinstance(mixer, DiscreteMamba2Mixer)
    seeded = _copy_projections(mixer, attention)
    nn.init.zeros_(mixer.D)
    return [
        *seeded,
        Seeded("in_proj z, z_bias", "gate open: factor 1"),
        Seeded("D", "0"),
        Seeded("in_proj A_log, A_log_bias", "memories of 4 to 256 positions over the heads"),
    ]


SEEDS: dict[type[nn.Module], Callable[[nn.Module, AttentionView, Tensor], list[Seeded]]] = {
    Mamba2Mixer: _seed_mamba2,
    DiscreteMamba2Mixer: _seed_discrete_mamba2,
}
