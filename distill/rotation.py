"""Whether the layers that become mixers can keep the teacher's rotary positions; known without its weights.

A mixer turns the columns of B and C as `distill.mixers.rotary` says. What a teacher's layer does with its queries and
keys is not looked up in a list but tried, on a few random numbers: the mixer must do exactly the same.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.attention import AttentionView, views
from distill.errors import UserError
from distill.mixers.rotary import rotate


def require_rotation(teacher: PreTrainedModel, layers: Iterable[int], state_dim: int) -> None:
    """Refuse ``rope: keep`` where a mixer could not do what attention does.

    Args:
        teacher: may be without weights, on the meta device.
        layers: indices of those that become mixers.
        state_dim: N, the state's numbers a channel of a head.

    Raises:
        UserError: with the reason: no rotary positions, heads turned in another way, or a state that is too narrow.
    """
    decoder = teacher.get_decoder()
    width = _width(decoder)
    if width is None:
        raise UserError("rope is keep, but the teacher's decoder has no rotary positions; use drop")
    if width > state_dim:
        raise UserError(
            f"rope is keep and state_dim {state_dim}, but the teacher turns {width} columns of every head; state_dim"
            f" must be at least {width}"
        )
    for index, attention in views(teacher, layers).items():
        if what := _difference(attention, width):
            raise UserError(
                f"rope is keep, but attention in layer {index} of the teacher {what}; use drop, or keep attention there"
            )


def _width(decoder: Any) -> int | None:
    """How many columns of a head are turned, by the frequencies that the decoder keeps, one for two columns."""
    angles = getattr(decoder, "rotary_emb", None)
    buffers = () if angles is None else angles.named_buffers()
    return max((2 * buffer.shape[0] for name, buffer in buffers if name.endswith("inv_freq")), default=None)


def _difference(attention: AttentionView, width: int) -> str | None:
    """What attention does otherwise than a mixer would, in words; None where they agree."""
    generator = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q_BHTP, k_BHTP = some(1, 1, 2, attention.head_dim), some(1, 1, 2, attention.head_dim)
    rotation = some(1, 2, width), some(1, 2, width)
    theirs = attention.turned(q_BHTP, k_BHTP, rotation)
    ours = rotate(q_BHTP.transpose(1, 2), k_BHTP.transpose(1, 2), rotation)
    if torch.equal(theirs[0], q_BHTP):
        return "does not turn its heads by position (NoPE)"
    if all(torch.allclose(their, our.transpose(1, 2)) for their, our in zip(theirs, ours, strict=True)):
        return None
    return "pairs the columns it turns in another way than the two halves of a head"
