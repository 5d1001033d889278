"""Rotary positions on what a mixer writes with and reads with, as the teacher's keys and queries carry them.

========  =============================================================================
symbol    meaning
========  =============================================================================
B, C      what a position writes with and reads with, N numbers a head; K and Q of attention
cos, sin  of every position's angles, W numbers, as the decoder hands them to its layers
W         how many columns are turned; those past it are not (partial rotary)
========  =============================================================================

::

    R_t u        = u ∘ cos_t + (−u_2 | u_1) ∘ sin_t          u = (u_1 | u_2), halves of the first W columns
    S_t          = decay S_{t−1} + x_t ⊗ R_t B_t
    y_t          = S_t R_t C_t
    R_t C · R_s B = C · R_{s−t} B                             only the distance between positions counts

The angles are never counted here: what the decoder computed from ``position_ids`` is used, so padding, packed
documents, a cache and the axes of images (merged into one cos and sin) are as they are for attention. A scaling that
a decoder folds into cos and sin (YaRN) goes onto B and C as it goes onto keys and queries.

Source: RoFormer (arXiv 2104.09864), in the layout of Llama, where a column is turned with the one W/2 further on.
"""

from typing import Literal

import torch
from torch import Tensor

from distill.mixers.parts import widen

Rope = Literal["drop", "keep"]
Rotation = tuple[Tensor, Tensor]
"""(cos, sin), each (B, T, W) or (1, T, W)."""


def rotate(B_BTHN: Tensor, C_BTHN: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor]:
    """Both turned by their positions' angles; computed in fp32 at least, and given back in their own dtype.

    Raises:
        ValueError: there is no rotation, or it is wider than the state.
    """
    if rotation is None:
        raise ValueError(
            "a mixer with rope: keep needs the angles that the decoder hands to its layers: pass"
            " position_embeddings=(cos, sin), or build it with rope='drop'"
        )
    cos_BT1W, sin_BT1W = (widen(part).unsqueeze(2) for part in rotation)
    width, state = cos_BT1W.shape[-1], B_BTHN.shape[-1]
    if width > state:
        raise ValueError(
            f"the rotation turns {width} columns and the state of a head has {state}: build the mixer with a state_dim"
            f" of at least {width}, or with rope='drop'"
        )
    return _turned(B_BTHN, cos_BT1W, sin_BT1W), _turned(C_BTHN, cos_BT1W, sin_BT1W)


def _turned(u_BTHN: Tensor, cos_BT1W: Tensor, sin_BT1W: Tensor) -> Tensor:
    width = cos_BT1W.shape[-1]
    u_BTHW, rest_BTHN = u_BTHN[..., :width], u_BTHN[..., width:]
    first, second = u_BTHW.chunk(2, dim=-1)
    turned_BTHW = torch.addcmul(u_BTHW * cos_BT1W, torch.cat([-second, first], dim=-1), sin_BT1W).to(u_BTHN.dtype)
    return torch.cat([turned_BTHW, rest_BTHN], dim=-1) if rest_BTHN.shape[-1] else turned_BTHW
