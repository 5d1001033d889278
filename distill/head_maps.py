"""Attention's queries, keys and values as affine maps that a mixer without scaling or norms can take over.

========  =============================================================================
symbol    meaning
========  =============================================================================
H, P, D   heads, channels a head, hidden size
K         key/value heads
u         what the layer reads, (D,)
d         columns a state has
W         of these, the first ones that are turned by their positions (``distill.mixers.rotary``)
========  =============================================================================

::

    q = √scaling · g_q ∘ (W_q u + b_q)         g: what a norm of queries or keys makes of each channel
    k = √scaling · g_k ∘ (W_k u + b_k)
    v =                   W_v u + b_v

The scaling of the scores is split evenly between q and k, which keeps both at one size.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.attention import AttentionView
from distill.capture import LayerTrace
from distill.projections import Projection


@dataclass(frozen=True)
class HeadMap:
    """u ↦ W u + b, head by head.

    Attributes:
        weight_HPD: W.
        bias_HP: b, or None where there is none.
    """

    weight_HPD: Tensor
    bias_HP: Tensor | None

    def augmented(self) -> Tensor:
        """(H, P, D + 1): the bias as what an input that is always 1 is multiplied with; zeros where there is none."""
        bias_HP = self.weight_HPD.new_zeros(self.weight_HPD.shape[:2]) if self.bias_HP is None else self.bias_HP
        return torch.cat([self.weight_HPD, bias_HP[..., None]], dim=-1)


def head_maps(attention: AttentionView, trace: LayerTrace) -> tuple[HeadMap, HeadMap, HeadMap]:
    """Queries (H, P, D), keys and values (K, P, D).

    Args:
        trace: an example of what the layer reads, for norms of queries or keys.
    """
    root = attention.scaling**0.5
    q_gain_I = _norm_gain(attention, attention.q, attention.q_norm, trace)
    k_gain_I = _norm_gain(attention, attention.k, attention.k_norm, trace)
    head_dim = attention.head_dim
    return (
        _head_map(attention.q, head_dim, root, q_gain_I),
        _head_map(attention.k, head_dim, root, k_gain_I),
        _head_map(attention.v, head_dim),
    )


def nearest_scores(query: HeadMap, key: HeadMap, d: int, turned: int) -> tuple[HeadMap, HeadMap]:
    """Queries and keys of at most d < P columns whose scores q · k are as near to the given ones as d columns allow.

    With the bias as an input of 1, the scores of a head are u_t (W_qᵀ W_k) u_s, and the nearest matrix of rank d is cut
    from its singular values (Eckart and Young), the square root of each given to both sides. Inputs count as if all
    directions were equally long, which behind a norm they nearly are. Columns that positions turn stay what they are:
    mixed with others, or moved, they would be turned by angles that are not theirs.

    Args:
        query, key: of as many heads, (H, P, D).
        turned: W ≤ d.

    Returns:
        Both in fp32 (fp64 if given in it), with a bias if one of them had one.
    """
    dtype = torch.promote_types(query.weight_HPD.dtype, torch.float32)
    q_HPE, k_HPE = query.augmented().to(dtype), key.augmented().to(dtype)
    q_HdE, k_HdE = _nearest_of_rank(q_HPE[:, turned:], k_HPE[:, turned:], d - turned)
    biased = query.bias_HP is not None or key.bias_HP is not None
    return (
        _split(torch.cat([q_HPE[:, :turned], q_HdE], dim=1), biased),
        _split(torch.cat([k_HPE[:, :turned], k_HdE], dim=1), biased),
    )


def _head_map(projection: Projection, head_dim: int, scale: float = 1.0, gain_I: Tensor | None = None) -> HeadMap:
    weight_ID, bias_I = projection.weight, projection.bias
    if gain_I is not None:
        weight_ID = gain_I[:, None] * weight_ID
        bias_I = None if bias_I is None else gain_I * bias_I
    return HeadMap(
        (scale * weight_ID).unflatten(0, (-1, head_dim)),
        None if bias_I is None else (scale * bias_I).unflatten(0, (-1, head_dim)),
    )


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


def _nearest_of_rank(q_HPE: Tensor, k_HPE: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Both sides, (H, ≤ rank, E), of the matrix of that rank nearest to QᵀK."""
    # The singular values of QᵀK = Q_q (R_q R_kᵀ) Q_kᵀ are those of what stands in the middle, at most (P, P).
    (q_basis_HEP, q_HPP), (k_basis_HEP, k_HPP) = torch.linalg.qr(q_HPE.mT), torch.linalg.qr(k_HPE.mT)
    left_HPP, size_HP, right_HPP = torch.linalg.svd(q_HPP @ k_HPP.mT)
    root_H1d = size_HP[:, None, :rank].sqrt()
    left_HEd, right_HEd = q_basis_HEP @ left_HPP[..., :rank], k_basis_HEP @ right_HPP.mT[..., :rank]
    return (left_HEd * root_H1d).mT, (right_HEd * root_H1d).mT


def _split(augmented_HPE: Tensor, biased: bool) -> HeadMap:
    return HeadMap(augmented_HPE[..., :-1], augmented_HPE[..., -1] if biased else None)
