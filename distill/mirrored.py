"""Both sides of a SiLU: what a Mamba-2 layer's activation cuts off is kept where the layer has room for it.

    SiLU(x) − SiLU(−x) = x

A layer that starts from attention's projections reads v, k and q through a SiLU, which lets next to nothing of their
negative side through. Where there are columns or heads to spare they get that side, with the sign turned:

    B, C   a state at least twice as wide as the head: SiLU(q)·SiLU(k) + SiLU(−q)·SiLU(−k), so that what agrees in
           being negative counts as well; what disagrees makes no score below zero, and a softmax has none either
    x      every second copy of a head (``distill.copies``) carries SiLU(−v), and its norm's weight turns that back:
           the copies together carry v
"""

import torch
from torch import Tensor

from distill.attention import AttentionView
from distill.copies import copies_of
from distill.mixers import Mamba2Mixer
from distill.mixers.parts import in_convolution


@torch.no_grad()
def mirror_state_(mixer: Mamba2Mixer, attention: AttentionView) -> bool:
    """Turn columns P … 2 P of every head's B and C into the first P with the sign turned, if there are so many.

    Returns:
        Whether there are.
    """
    width = attention.head_dim
    if mixer.state_dim < 2 * width:
        return False
    for name in ("B", "C"):
        for rows in _made_by(mixer, name):
            by_head = rows.unflatten(0, (mixer.n_heads, mixer.state_dim))
            by_head[:, width : 2 * width] = -by_head[:, :width]
    return True


@torch.no_grad()
def mirror_values_(mixer: Mamba2Mixer, attention: AttentionView) -> bool:
    """Turn the sign of the values of every second copy of a head, and of its norm's weight, if there are copies.

    Returns:
        Whether there are.
    """
    copies = copies_of(mixer, attention)
    for rows in (*_made_by(mixer, "x"), mixer.norm.weight):
        rows.unflatten(0, (attention.n_heads, copies, mixer.head_dim))[:, 1::2] *= -1
    return copies > 1


def _made_by(mixer: Mamba2Mixer, name: str) -> list[Tensor]:
    """The rows of ``in_proj`` that make something, and what the convolution adds to it."""
    rows = mixer.in_rows()
    assert mixer.conv1d.bias is not None
    return [mixer.in_proj.weight[rows[name]], mixer.conv1d.bias[in_convolution(rows, name)]]
