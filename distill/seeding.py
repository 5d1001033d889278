"""Attention weights become mixer weights: x ← V, B ← K, C ← Q (v, k and q where a mixer calls them so), out ← O.

Linear attention computes Σ_s (q_t · k_s) v_s; a state-space layer computes Σ_s (C_t · B_s) decay x_s. So the teacher's
projections have a place, head by head (MambaInLlama, arXiv 2408.15237); what attention does not have, decay, gate, skip
and convolution, starts where it disturbs least. Keys and values that query heads share are repeated to the query heads,
and all of a head to its copies (``distill.copies``).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distill.attention import AttentionView
from distill.calibration import steady_direction
from distill.capture import LayerTrace
from distill.copies import copies_of, mean_of_copies, shared_out
from distill.mirrored import Activated, mirror_state_, mirror_values_
from distill.mixers import BasedMixer, DiscreteMamba2Mixer, GatedDeltaNetMixer, HedgehogMixer, Mamba2Mixer, Mixer
from distill.mixers.parts import in_convolution, inverse_softplus
from distill.objectives import attention_matrix
from distill.projections import Projection

GATE_INPUT = 2.0  # SiLU is past its bend here, and not yet so far that the gate could not close
LARGEST_RATIO = 1e3
BETA = 0.1  # the least disturbing that still learns: attention exchanges nothing that it read (docs/experiments.md)


@dataclass(frozen=True)
class Seeded:
    """One row of the conversion report: where a mixer's weights come from."""

    target: str
    source: str


@torch.no_grad()
def seed_mixer(mixer: Mixer, attention: AttentionView, trace: LayerTrace) -> list[Seeded]:
    """Fill ``mixer`` from ``attention``, in place.

    Args:
        mixer: freshly made, of any class in ``MIXERS``.
        attention: the layer it replaces.
        trace: an example of what both read (``distill.calibration``).

    Returns:
        What came from where, for the report.
    """
    return SEEDS[type(mixer)](mixer, attention, trace)


@dataclass(frozen=True)
class Rows:
    """What a mixer calls the rows of ``in_proj`` that take values, keys and queries, and how a wider state starts.

    Attributes:
        unused: which of keys and queries is zero in the columns that a state has more than a head.
    """

    v: str
    k: str
    q: str
    unused: str


_STATE_SPACE = Rows("x", "B", "C", unused="C")
_FEATURES = Rows("v", "k", "q", unused="q")
_DELTA = Rows("v", "k", "q", unused="k")


Copied = Mamba2Mixer | DiscreteMamba2Mixer | GatedDeltaNetMixer | BasedMixer | HedgehogMixer


def _copy_projections(
    mixer: Copied,
    attention: AttentionView,
    trace: LayerTrace,
    named: Rows = _STATE_SPACE,
) -> list[Seeded]:
    """The four projections and, where the teacher has them, their biases.

    The scaling of the scores is split evenly between B and C, which keeps both at one size. A norm of queries or keys
    becomes a factor on each row. A bias goes into the convolution: its only open tap is the current position's, so
    W u + b is what the projection would have been.
    """
    half = attention.scaling**0.5
    sources = {named.v: (attention.v, 1.0), named.k: (attention.k, half), named.q: (attention.q, half)}
    rows = mixer.in_rows()
    gains = {
        named.k: _norm_gain(attention, attention.k, attention.k_norm, trace),
        named.q: _norm_gain(attention, attention.q, attention.q_norm, trace),
    }
    for name, (projection, scale) in sources.items():
        place = rows[name]
        width = (place.stop - place.start) // mixer.n_heads
        made = mixer.in_proj.weight[place]
        # Columns of a state wider than the head: one of keys and queries starts at zero there, so that they have no
        # influence, but the other at random, since the gradient of each is a multiple of the other. Where a
        # softmax stands between, it is what tells these columns apart: else they would learn the same for ever.
        beyond = torch.zeros_like(made) if name == named.unused else made
        weight_ID, bias = projection.weight, projection.bias
        if (gain_I := gains.get(name)) is not None:
            weight_ID = gain_I[:, None] * weight_ID
            bias = None if bias is None else gain_I * bias
        mixer.in_proj.weight[place] = _heads(scale * weight_ID, attention.head_dim, beyond, width)
        if bias is not None:
            assert mixer.conv1d.bias is not None
            bias_I1, beyond = scale * bias[:, None], torch.zeros_like(made[:, :1])
            mixer.conv1d.bias[in_convolution(rows, name)] = _heads(bias_I1, attention.head_dim, beyond, width)[:, 0]
    copies = copies_of(mixer, attention)
    mixer.out_proj.weight.copy_(shared_out(attention.o.weight, attention.head_dim, copies))
    if attention.o.bias is not None:
        mixer.out_proj.bias.copy_(attention.o.bias)
    state = (rows[named.q].stop - rows[named.q].start) // mixer.n_heads
    if narrower := state < attention.head_dim:
        _narrow_scores_(mixer, attention, trace, named, state)
    normed_k, normed_q = (_NORMED if norm is not None else "" for norm in (attention.k_norm, attention.q_norm))
    shared, copied = (_repeated(mixer.n_heads // heads) for heads in (attention.n_kv_heads, attention.n_heads))
    return [
        Seeded(f"in_proj {named.v}", f"v{shared}"),
        Seeded(f"in_proj {named.k}", f"k{shared}, × √scaling{normed_k}"),
        Seeded(f"in_proj {named.q}", f"q{copied}, × √scaling{normed_q}"),
        Seeded("out_proj", "o" + (f", each column shared out over {copies} heads" if copies > 1 else "")),
        Seeded("conv1d", "identity" + (", bias from q, k, v" if attention.q.bias is not None else "")),
        *([Seeded(f"in_proj {named.q}, {named.k}", f"the nearest scores of rank {state}, head by head")] * narrower),
    ]


def _repeated(times: int) -> str:
    return f", each repeated {times}×" if times > 1 else ""


_NORMED = ", × the norm's weight / mean size before the norm"


def _norm_gain(attention: AttentionView, projection: Projection, norm: Any, trace: LayerTrace) -> Tensor | None:
    """(heads·P,) what a norm of queries or keys multiplies each channel with, token for token in least squares.

    A state-space layer has no norm there. norm(q) = w q / rms(q), of which only rms depends on the token: the factor is
    w over a mean of rms, weighted by q². What is left, head by head, the ratio of the matrices' sizes takes out.
    """
    if norm is None:
        return None
    before_BTI = projection(trace.attention_input)
    after_BTI = attention.by_head(before_BTI, before_BTI.shape[-1] // attention.head_dim, norm).flatten(2)
    before_BTI, after_BTI = before_BTI.float(), after_BTI.float()
    size_I = before_BTI.square().sum(dim=(0, 1))
    return (before_BTI * after_BTI).sum(dim=(0, 1)) / size_I.clamp_min(torch.finfo(size_I.dtype).tiny)


def _heads(weight: Tensor, head_dim: int, beyond: Tensor, width: int) -> Tensor:
    """(heads·P, D) to (H·width, D): repeated to the mixer's heads; rows past a head's P are those of ``beyond``."""
    by_head = weight.unflatten(0, (-1, head_dim))
    out = beyond.unflatten(0, (-1, width)).clone()
    used = min(width, head_dim)
    out[:, :used] = by_head.repeat_interleave(len(out) // len(by_head), dim=0)[:, :used]
    return out.flatten(0, 1)


def _size_ratio(mixer: Mixer, attention: AttentionView, trace: LayerTrace) -> Tensor:
    """(H,) how much larger attention's matrix is than the mixer's, head by head, in Frobenius norm.

    Copies of a head have one matrix together, and all the same ratio.
    """
    q_BHTP, k_BHTP = attention.queries_and_keys(trace.attention_input, trace.position_embeddings)
    teacher_BHTT = attention_matrix(
        q_BHTP, k_BHTP, scaling=attention.scaling, window=attention.sliding_window, softcap=attention.softcap
    )
    each_BHTT = mixer.mixing_matrix(trace.attention_input, position_embeddings=trace.position_embeddings)
    student_BHTT = mean_of_copies(each_BHTT, attention.n_heads, dim=1)
    sizes = (matrix_BHTT.float().square().sum(dim=(0, 2, 3)).sqrt() for matrix_BHTT in (teacher_BHTT, student_BHTT))
    teacher_H, student_H = sizes
    ratio_H = teacher_H / student_H.clamp_min(torch.finfo(student_H.dtype).tiny)
    # A head without keys or queries (pruned, say) has a matrix of zeros, which no factor brings to size.
    ratio_H = ratio_H.clamp(1 / LARGEST_RATIO, LARGEST_RATIO)
    return ratio_H.repeat_interleave(copies_of(mixer, attention))


def _value_sizes(mixer: Mixer, attention: AttentionView, trace: LayerTrace) -> Tensor:
    """(H,) root mean square of the values that each head gets."""
    size_H = attention.values(trace.attention_input).square().mean(dim=(0, 1, 3)).sqrt()
    return size_H.repeat_interleave(copies_of(mixer, attention))


def _mirrored_state_(mixer: Activated, attention: AttentionView, named: Rows) -> list[Seeded]:
    if not mirror_state_(mixer, attention, (named.k, named.q)):
        return []
    return [Seeded(f"in_proj {named.k}, {named.q}", "the columns past a head's: its own, sign turned, behind SiLU")]


def _mirrored_values_(mixer: Activated, attention: AttentionView, named: Rows) -> list[Seeded]:
    if not mirror_values_(mixer, attention, named.v):
        return []
    return [Seeded(f"in_proj {named.v}, norm", "every second copy of a head with the sign turned, behind SiLU")]


def _seed_mamba2(mixer: Mixer, attention: AttentionView, trace: LayerTrace) -> list[Seeded]:
    assert isinstance(mixer, Mamba2Mixer)
    seeded = _copy_projections(mixer, attention, trace)
    of_state = _mirrored_state_(mixer, attention, _STATE_SPACE)
    nn.init.zeros_(mixer.D)
    # The norm follows the gate, so a gate that is equal over a head's channels and never changes sign has no effect.
    mixer.in_proj.weight[mixer.in_rows()["z"]] = GATE_INPUT * steady_direction(trace.attention_input)
    # The norm makes every head's output unit size; attention's is about that of the values it averages.
    value_size_H = _value_sizes(mixer, attention, trace)
    mixer.norm.weight.copy_(value_size_H.repeat_interleave(mixer.head_dim))
    of_values = _mirrored_values_(mixer, attention, _STATE_SPACE)
    # A step of another size scales the whole matrix; A takes it out of the decay again.
    step_H = _size_ratio(mixer, attention, trace)
    mixer.dt_bias.copy_(inverse_softplus(step_H))
    mixer.A_log.sub_(step_H.log())
    return [
        *seeded,
        *of_state,
        *of_values,
        Seeded("in_proj z", "open: the direction in which the layer's inputs are steady"),
        Seeded("norm", "size of v, head by head"),
        Seeded("dt_bias", "size of the attention matrix, head by head"),
        Seeded("in_proj dt", "0"),
        Seeded("A_log", "memories of 4 to 256 positions over the heads"),
        Seeded("D", "0"),
    ]


def _seed_discrete_mamba2(mixer: Mixer, attention: AttentionView, trace: LayerTrace) -> list[Seeded]:
    assert isinstance(mixer, DiscreteMamba2Mixer)
    seeded = _copy_projections(mixer, attention, trace)
    nn.init.zeros_(mixer.D)
    mixer.scale_reads_(_size_ratio(mixer, attention, trace))
    return [
        *seeded,
        Seeded("in_proj C", "scaled to the size of the attention matrix, head by head"),
        Seeded("in_proj z, z_bias", "gate open: factor 1"),
        Seeded("in_proj A_log, A_log_bias", "memories of 4 to 256 positions over the heads"),
        Seeded("D", "0"),
    ]


def _seed_gated_deltanet(mixer: Mixer, attention: AttentionView, trace: LayerTrace) -> list[Seeded]:
    assert isinstance(mixer, GatedDeltaNetMixer)
    # Keys that are zero in new columns are as long as before and find what they found; a query's length is normed out.
    seeded = _copy_projections(mixer, attention, trace, _DELTA)
    of_state = _mirrored_state_(mixer, attention, _DELTA)
    steady_D = steady_direction(trace.attention_input)
    mixer.in_proj.weight[mixer.in_rows()["z"]] = GATE_INPUT * steady_D
    mixer.in_proj.weight[mixer.in_rows()["b"]] = math.log(BETA / (1 - BETA)) * steady_D
    # The norm makes every head's output unit size, and the open gate makes it SiLU(GATE_INPUT).
    value_size_H = _value_sizes(mixer, attention, trace)
    opened = GATE_INPUT / (1 + math.exp(-GATE_INPUT))
    mixer.norm.weight.copy_(value_size_H.repeat_interleave(mixer.head_dim) / opened)
    of_values = _mirrored_values_(mixer, attention, _DELTA)
    return [
        *seeded,
        *of_state,
        *of_values,
        Seeded("in_proj z", "open: the direction in which the layer's inputs are steady"),
        Seeded("norm", "size of v, head by head"),
        Seeded("in_proj b", f"β = {BETA:g}, along that direction"),
        Seeded("in_proj a", "0"),
        Seeded("A_log", "memories of 4 to 256 positions over the heads"),
    ]


def _seed_based(mixer: Mixer, attention: AttentionView, trace: LayerTrace) -> list[Seeded]:
    assert isinstance(mixer, BasedMixer)
    return _copy_projections(mixer, attention, trace, _FEATURES)


def _seed_hedgehog(mixer: Mixer, attention: AttentionView, trace: LayerTrace) -> list[Seeded]:
    assert isinstance(mixer, HedgehogMixer)
    return [
        *_copy_projections(mixer, attention, trace, _FEATURES),
        Seeded("in_proj A_log", "0"),
        Seeded("A_log_bias", "memories of 4 to 256 positions over the heads"),
    ]


def _narrow_scores_(mixer: Copied, attention: AttentionView, trace: LayerTrace, named: Rows, d: int) -> None:
    """Queries and keys of d numbers whose scores u_t W u_s are as near to attention's, before rotation, as d allow.

    W = scaling · W_qᵀ W_k of a head, (D, D), and the nearest matrix of rank d is cut from its singular values
    (Eckart and Young), the square root of each given to both sides. Inputs count as if all directions were equally
    long, which behind a norm they nearly are. Biases, which have no place in W, are dropped.
    """
    rows = mixer.in_rows()
    q_HDP = _columns(attention, attention.q, attention.q_norm, trace)
    k_HDP = attention.per_query_head(_columns(attention, attention.k, attention.k_norm, trace), dim=0)
    # The singular values of W = Q_q (R_q R_kᵀ) Q_kᵀ are those of what stands in the middle, (P, P).
    (q_basis_HDP, q_HPP), (k_basis_HDP, k_HPP) = torch.linalg.qr(q_HDP), torch.linalg.qr(k_HDP)
    left_HPP, size_HP, right_HPP = torch.linalg.svd(attention.scaling * q_HPP @ k_HPP.mT)
    left_HDP, right_HPD = q_basis_HDP @ left_HPP, right_HPP @ k_basis_HDP.mT
    root_H1d = size_HP[:, None, :d].sqrt()
    narrow = {named.q: (left_HDP[:, :, :d] * root_H1d).mT, named.k: right_HPD[:, :d] * root_H1d.mT}
    for name, weight_HdD in narrow.items():
        weight_HdD = weight_HdD.repeat_interleave(mixer.n_heads // len(weight_HdD), dim=0)
        mixer.in_proj.weight[rows[name]] = weight_HdD.flatten(0, 1).to(mixer.in_proj.weight.dtype)
        if mixer.conv1d.bias is not None:
            mixer.conv1d.bias[in_convolution(rows, name)].zero_()


def _columns(attention: AttentionView, projection: Projection, norm: Any, trace: LayerTrace) -> Tensor:
    """(heads, D, P), fp32: a projection's weights, head by head, times what its norm makes of each channel."""
    weight_ID, gain_I = projection.weight.float(), _norm_gain(attention, projection, norm, trace)
    scaled_ID = weight_ID if gain_I is None else gain_I[:, None] * weight_ID
    return scaled_ID.unflatten(0, (-1, attention.head_dim)).mT


SEEDS: dict[type, Callable[[Mixer, AttentionView, LayerTrace], list[Seeded]]] = {
    Mamba2Mixer: _seed_mamba2,
    DiscreteMamba2Mixer: _seed_discrete_mamba2,
    GatedDeltaNetMixer: _seed_gated_deltanet,
    BasedMixer: _seed_based,
    HedgehogMixer: _seed_hedgehog,
}
