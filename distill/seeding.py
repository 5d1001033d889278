"""Attention weights become mixer weights: x ← V, B ← K, C ← Q (v, k and q where a mixer calls them so), out ← O.

Linear attention computes Σ_s (q_t · k_s) v_s; a state-space layer computes Σ_s (C_t · B_s) decay x_s. So the teacher's
projections have a place, head by head (MambaInLlama, arXiv 2408.15237); what attention does not have, decay, gate, skip
and convolution, starts where it disturbs least. Keys and values that query heads share are repeated to the query heads,
and all of a head to its copies (``distill.copies``).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distill.attention import AttentionView
from distill.calibration import steady_direction
from distill.capture import LayerTrace
from distill.copies import copies_of, mean_of_copies, shared_out
from distill.head_maps import HeadMap, head_maps, nearest_scores
from distill.mirrored import BehindSilu, mirror_state_, mirror_values_
from distill.mixers import BasedMixer, DiscreteMamba2Mixer, GatedDeltaNetMixer, HedgehogMixer, Mamba2Mixer, Mixer
from distill.mixers.parts import in_convolution, inverse_softplus

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


Seedable = Mamba2Mixer | DiscreteMamba2Mixer | GatedDeltaNetMixer | BasedMixer | HedgehogMixer


def _copy_projections(
    mixer: Seedable,
    attention: AttentionView,
    trace: LayerTrace,
    named: Rows = _STATE_SPACE,
) -> list[Seeded]:
    """The four projections and, where the teacher has them, their biases."""
    query, key, value = head_maps(attention, trace)
    columns = mixer.in_rows()[named.q]
    state = (columns.stop - columns.start) // mixer.n_heads  # of BASED not all of its state: it makes features of them
    if state < attention.head_dim:
        query, key = nearest_scores(query, _per_query_head(key, attention), state, _turned(mixer, trace))
    for name, made in ((named.v, value), (named.k, key), (named.q, query)):
        _copy_rows_(mixer, name, made, zero_beyond=name == named.unused)
    mixer.out_proj.weight.copy_(shared_out(attention.o.weight, attention.head_dim, copies_of(mixer, attention)))
    if attention.o.bias is not None:
        mixer.out_proj.bias.copy_(attention.o.bias)
    return _told(mixer, attention, named, state)


def _told(mixer: Seedable, attention: AttentionView, named: Rows, state: int) -> list[Seeded]:
    """What `_copy_projections` did, for the report."""
    copies = copies_of(mixer, attention)
    normed_k, normed_q = (_NORMED if norm is not None else "" for norm in (attention.k_norm, attention.q_norm))
    shared, copied = (_repeated(mixer.n_heads // heads) for heads in (attention.n_kv_heads, attention.n_heads))
    biased = any(projection.bias is not None for projection in (attention.q, attention.k, attention.v))
    rows = [
        Seeded(f"in_proj {named.v}", f"v{shared}"),
        Seeded(f"in_proj {named.k}", f"k{shared}, × √scaling{normed_k}"),
        Seeded(f"in_proj {named.q}", f"q{copied}, × √scaling{normed_q}"),
        Seeded("out_proj", "o" + (f", each column shared out over {copies} heads" if copies > 1 else "")),
        Seeded("conv1d", "identity" + (", bias from q, k, v" if biased else "")),
    ]
    if state < attention.head_dim:
        rows.append(Seeded(f"in_proj {named.q}, {named.k}", f"the nearest scores of rank {state}, head by head"))
    return rows


def _copy_rows_(mixer: Seedable, name: str, made: HeadMap, *, zero_beyond: bool) -> None:
    """The rows of ``in_proj`` that a map fills, repeated to the mixer's heads, and its bias.

    The bias goes into the convolution: its only open tap is the current position's, so W u + b is what the projection
    would have been.

    A state wider than the map has rows beyond it. Those of keys or of queries start at zero, so that they have no
    influence, but the others at random, since the gradient of each is a multiple of the other. Where a softmax stands
    between, it is what tells these columns apart: else they would learn the same for ever.
    """
    rows, repeats = mixer.in_rows(), mixer.n_heads // len(made.weight_HPD)
    in_rows_HWD = mixer.in_proj.weight[rows[name]].unflatten(0, (mixer.n_heads, -1))
    used = min(in_rows_HWD.shape[1], made.weight_HPD.shape[1])
    in_rows_HWD[:, :used] = made.weight_HPD.repeat_interleave(repeats, dim=0)[:, :used]
    if zero_beyond:
        in_rows_HWD[:, used:] = 0
    if made.bias_HP is not None:
        assert mixer.conv1d.bias is not None
        bias_HW = mixer.conv1d.bias[in_convolution(rows, name)].unflatten(0, (mixer.n_heads, -1))
        bias_HW[:, :used] = made.bias_HP.repeat_interleave(repeats, dim=0)[:, :used]


def _per_query_head(key: HeadMap, attention: AttentionView) -> HeadMap:
    bias_HP = None if key.bias_HP is None else attention.per_query_head(key.bias_HP, dim=0)
    return HeadMap(attention.per_query_head(key.weight_HPD, dim=0), bias_HP)


def _turned(mixer: Seedable, trace: LayerTrace) -> int:
    """How many of a head's first columns are turned by their positions."""
    if mixer.rope == "drop" or trace.position_embeddings is None:
        return 0
    return trace.position_embeddings[0].shape[-1]


def _repeated(times: int) -> str:
    return f", each repeated {times}×" if times > 1 else ""


_NORMED = ", × the norm's weight / mean size before the norm"


def _size_ratio(mixer: Mixer, attention: AttentionView, trace: LayerTrace) -> Tensor:
    """(H,) how much larger attention's matrix is than the mixer's, head by head, in Frobenius norm.

    Copies of a head have one matrix together, and all the same ratio.
    """
    teacher_BHTT = attention.matrix(trace.attention_input, trace.position_embeddings)
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


def _mirror_(mixer: BehindSilu, attention: AttentionView, named: Rows) -> list[Seeded]:
    """What the mixer's SiLU cuts off; the norm's weight must have been seeded, since it turns values back."""
    told = []
    if mirror_state_(mixer, attention, (named.k, named.q)):
        told.append(
            Seeded(f"in_proj {named.k}, {named.q}", "the columns past a head's: its own, sign turned, behind SiLU")
        )
    if mirror_values_(mixer, attention, named.v):
        told.append(Seeded(f"in_proj {named.v}, norm", "every second copy of a head with the sign turned, behind SiLU"))
    return told


def _seed_mamba2(mixer: Mixer, attention: AttentionView, trace: LayerTrace) -> list[Seeded]:
    assert isinstance(mixer, Mamba2Mixer)
    seeded = _copy_projections(mixer, attention, trace)
    nn.init.zeros_(mixer.D)
    # The norm follows the gate, so a gate that is equal over a head's channels and never changes sign has no effect.
    mixer.in_proj.weight[mixer.in_rows()["z"]] = GATE_INPUT * steady_direction(trace.attention_input)
    # The norm makes every head's output unit size; attention's is about that of the values it averages.
    value_size_H = _value_sizes(mixer, attention, trace)
    mixer.norm.weight.copy_(value_size_H.repeat_interleave(mixer.head_dim))
    mirrored = _mirror_(mixer, attention, _STATE_SPACE)
    # A step of another size scales the whole matrix; A takes it out of the decay again.
    step_H = _size_ratio(mixer, attention, trace)
    mixer.dt_bias.copy_(inverse_softplus(step_H))
    mixer.A_log.sub_(step_H.log())
    return [
        *seeded,
        *mirrored,
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
    steady_D = steady_direction(trace.attention_input)
    mixer.in_proj.weight[mixer.in_rows()["z"]] = GATE_INPUT * steady_D
    mixer.in_proj.weight[mixer.in_rows()["b"]] = math.log(BETA / (1 - BETA)) * steady_D
    # The norm makes every head's output unit size, and the open gate makes it SiLU(GATE_INPUT).
    value_size_H = _value_sizes(mixer, attention, trace)
    opened = GATE_INPUT / (1 + math.exp(-GATE_INPUT))
    mixer.norm.weight.copy_(value_size_H.repeat_interleave(mixer.head_dim) / opened)
    mirrored = _mirror_(mixer, attention, _DELTA)
    return [
        *seeded,
        *mirrored,
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


SEEDS: dict[type, Callable[[Mixer, AttentionView, LayerTrace], list[Seeded]]] = {
    Mamba2Mixer: _seed_mamba2,
    DiscreteMamba2Mixer: _seed_discrete_mamba2,
    GatedDeltaNetMixer: _seed_gated_deltanet,
    BasedMixer: _seed_based,
    HedgehogMixer: _seed_hedgehog,
}
