"""Several heads of a mixer for each head of attention: what each of them is, and what they are together.

    e                 heads of the mixer for each of attention's (``student.expand``)
    copies            of head h of attention: heads h·e … h·e + e − 1 of the mixer
    x, B, C           of every copy: the head's v, k and q (behind a SiLU every second's is −v: ``distill.mirrored``)
    out               of every copy: 1/e of the head's columns of the output projection

So what the copies of a head are together is their mean:  out = Σ_h W_h · 1/e Σ_c M_hc v_h.

Softmax attends to the last token and to one far away in one row; a state-space head forgets at one pace at a time. Two
copies that differ in their memories can be the near and the far part. Mamba's own ``expand``, which is 2, says the same
of a layer: twice as many channels as the stream has.
"""

from typing import Protocol

from torch import Tensor

from distill.errors import UserError
from distill.mixers import MIXERS

ALIKE = {"based": "forgets nothing, so copies of a head would stay alike", "sliding_window": "is attention itself"}
"""Mixers of which a head has no second copy, and why."""


class Headed(Protocol):
    """What has heads: a mixer, or a view of attention."""

    @property
    def n_heads(self) -> int:
        """H."""


def require_copies(expand: int, mixer: str, keep_heads: bool) -> None:
    """Refuse what no mixer could be made of.

    Args:
        keep_heads: whether single heads keep attention beside the mixer.

    Raises:
        UserError: with what would do.
    """
    if expand < 1:
        raise UserError(f"expand is {expand}; it must be at least 1")
    if expand > 1 and mixer in ALIKE:
        others = ", ".join(sorted(set(MIXERS) - set(ALIKE)))
        raise UserError(f"expand is {expand}, but {mixer} {ALIKE[mixer]}; give 1, or one of the mixers {others}")
    if expand > 1 and keep_heads:
        raise UserError(f"expand is {expand}, and heads that are kept have no copies; give expand 1 or no keep_heads")


def copies_of(mixer: Headed, attention: Headed) -> int:
    """e, of a mixer in the place of this attention."""
    return mixer.n_heads // attention.n_heads


def mean_of_copies(heads: Tensor, n_heads: int, dim: int) -> Tensor:
    """What the copies of each of attention's ``n_heads`` are together; of n_heads·e at ``dim`` (≥ 0) n_heads stay."""
    if heads.shape[dim] == n_heads:
        return heads
    return heads.unflatten(dim, (n_heads, -1)).mean(dim + 1)


def spread(numbers_H: Tensor, copies: int) -> Tensor:
    """The same numbers in another order: the copies of each head get every H/e-th of them, as far apart as can be."""
    return numbers_H.unflatten(0, (copies, -1)).T.flatten()


def shared_out(weight_DI: Tensor, head_dim: int, copies: int) -> Tensor:
    """(D, heads·P) to (D, heads·e·P): every copy has 1/e of its head's columns."""
    by_head_DHP = weight_DI.unflatten(1, (-1, head_dim)) / copies
    return by_head_DHP.repeat_interleave(copies, dim=1).flatten(1)
