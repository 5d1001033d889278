"""Both sides of a SiLU: what a mixer's activation cuts off is kept where the mixer has room for it.

    SiLU(x) − SiLU(−x) = x

A Mamba-2 or a Gated DeltaNet layer that starts from attention's projections reads v, k and q through a SiLU, which lets
next to nothing of their negative side through. Where there are columns or heads to spare they get that side, with the
sign turned:

    k, q   a state at least twice as wide as the head: SiLU(q)·SiLU(k) + SiLU(−q)·SiLU(−k), so that what agrees in
           being negative counts as well; what disagrees makes no score below zero, and a softmax has none either
    v      every second copy of a head (``distill.copies``) carries SiLU(−v), and its norm's weight turns that back:
           the copies together carry v; of an odd number there is one more on this side, and each counts less
"""

import torch
from torch import Tensor

from distill.attention import AttentionView
from distill.copies import copies_of
from distill.mixers import GatedDeltaNetMixer, Mamba2Mixer
from distill.mixers.parts import in_convolution

BehindSilu = Mamba2Mixer | GatedDeltaNetMixer
"""What reads values, keys and queries through a SiLU, and has a norm whose weight can turn a head's sign back."""


@torch.no_grad()
def mirror_state_(mixer: BehindSilu, attention: AttentionView, names: tuple[str, str]) -> bool:
    """Turn columns P … 2 P of a head's keys and queries into its first P with the sign turned, if there are so many.

    Args:
        names: what ``mixer.in_rows`` calls them.

    Returns:
        Whether there are.
    """
    width = attention.head_dim
    if mixer.state_dim < 2 * width:
        return False
    for name in names:
        for rows in _made_by(mixer, name):
            by_head = rows.unflatten(0, (mixer.n_heads, mixer.state_dim))
            by_head[:, width : 2 * width] = -by_head[:, :width]
    return True


@torch.no_grad()
def mirror_values_(mixer: BehindSilu, attention: AttentionView, name: str) -> bool:
    """Turn the sign of the values of every second copy of a head, and of its norm's weight, if there are copies.

    Args:
        name: what ``mixer.in_rows`` calls the values.

    Returns:
        Whether there are.
    """
    copies = copies_of(mixer, attention)
    if copies == 1:
        return False
    for rows in _made_by(mixer, name):
        _by_copy(rows, attention, copies)[:, 1::2] *= -1
    norm_HCP = _by_copy(mixer.norm.weight, attention, copies)
    turned = copies // 2
    norm_HCP[:, 0::2] *= copies / (2 * (copies - turned))
    norm_HCP[:, 1::2] *= -copies / (2 * turned)
    return True


def _by_copy(rows: Tensor, attention: AttentionView, copies: int) -> Tensor:
    """(H·e·P, …) to (H, e, P, …), the same memory."""
    return rows.unflatten(0, (attention.n_heads, copies, -1))


def _made_by(mixer: BehindSilu, name: str) -> list[Tensor]:
    """The rows of ``in_proj`` that make something, and what the convolution adds to it."""
    rows, bias = mixer.in_rows(), mixer.conv1d.bias
    return [mixer.in_proj.weight[rows[name]], *([] if bias is None else [bias[in_convolution(rows, name)]])]
