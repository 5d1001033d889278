"""How attention turns queries and keys by their positions: with its family's own function, on the channels it turns.

    q, k = rotate(q, k, cos, sin)          of P channels a head the first W, as many as cos and sin have

B batch, H query heads, K key/value heads, T tokens.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distill.errors import UserError

Positions = tuple[Tensor, Tensor] | None
"""The (cos, sin) that a decoder hands to its layers; None where positions are learned."""

Rotate = Callable[..., tuple[Tensor, Tensor]]
"""``(q_BHTW, k_BKTW, cos, sin) -> (q, k)``."""


def rotation_of(attention: Any) -> Rotate:
    """The family's own, since they differ in which channels make a pair; it stands beside the attention class."""
    beside = sys.modules[type(attention).__module__]
    return getattr(beside, "apply_rotary_pos_emb", partial(_no_rotation, type(attention).__name__))


def turned(rotate: Rotate, q_BHTP: Tensor, k_BKTP: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
    """Queries and keys with their positions rotated in; as they are where there are none."""
    if positions is None:
        return q_BHTP, k_BKTP
    width = positions[0].shape[-1]
    if width == q_BHTP.shape[-1]:
        return rotate(q_BHTP, k_BKTP, *positions)
    q_BHTW, k_BKTW = rotate(q_BHTP[..., :width], k_BKTP[..., :width], *positions)
    return torch.cat([q_BHTW, q_BHTP[..., width:]], dim=-1), torch.cat([k_BKTW, k_BKTP[..., width:]], dim=-1)


def _no_rotation(attention: str, *_inputs: Tensor) -> tuple[Tensor, Tensor]:
    raise UserError(
        f"{attention} has no apply_rotary_pos_emb beside it, by which others rotate queries and keys; take a teacher of"
        " another family, or let rotation_of in distill/turning.py find the function that it has"
    )
