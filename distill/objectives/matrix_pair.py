"""What a student's and a teacher's mixing matrix are made of, for some sequences and heads at a time.

Z batch × key heads, G query heads that share a key head, Y = Z·G, T tokens, D width of an attention head, N state size;
ℓ cumulative log decay, so that a_{s+1} … a_t = exp(ℓ_t − ℓ_s). `distill.objectives.strips` compares the two.
"""

from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from distill.ssd.factors import MatrixFactors


@dataclass(frozen=True)
class Target:
    """The teacher's matrix, unwritten, and what of it counts; as the arguments of `streamed_mixing_distance`.

    Attributes:
        start_BT: where the document of each token begins; None where nothing is packed.
        valid_BT: None where all is.
    """

    q_BHTD: Tensor
    k_BKTD: Tensor
    scaling: float
    window: int | None
    softcap: float | None
    start_BT: Tensor | None
    valid_BT: Tensor | None

    @property
    def shared(self) -> int:
        """Query heads a key head."""
        return self.q_BHTD.shape[1] // self.k_BKTD.shape[1]

    def heads(self, keys: slice) -> slice:
        """The query heads of some key heads."""
        return slice(keys.start * self.shared, keys.stop * self.shared)


def working_dtype(student: MatrixFactors, target: Target) -> torch.dtype:
    tensors = [x for x in (*student.tensors(), target.q_BHTD, target.k_BKTD) if x is not None]
    return reduce(torch.promote_types, (x.dtype for x in tensors), torch.float32)


@dataclass(frozen=True)
class Pair:
    """What the two matrices of some heads are made of, in the working precision; nothing is written or read at padding.

    Attributes:
        q_ZGTD: queries, scaled.
        l_YT: ℓ, in fp64.
        own_YT: the diagonal of M.
        starts: of ``start_ZT``, on the host.
    """

    q_ZGTD: Tensor
    k_ZTD: Tensor
    l_YT: Tensor
    B_YTN: Tensor
    C_YTN: Tensor
    step_YT1: Tensor
    own_YT: Tensor
    window: int | None
    softcap: float | None
    start_ZT: Tensor | None
    starts: list[list[int]] | None
    valid_ZT: Tensor | None


def pair_of(student: MatrixFactors, target: Target, batch: slice, keys: slice, dtype: torch.dtype) -> Pair:
    """Copies of the factors of some sequences and heads, with the positions of a head next to each other."""
    n_keys, heads = keys.stop - keys.start, target.heads(keys)
    n_sequences = batch.stop - batch.start

    def by_head(x_BTH: Tensor) -> Tensor:
        return x_BTH[batch, :, heads].transpose(1, 2).flatten(0, 1).to(dtype).contiguous()

    def by_key(x_BT: Tensor | None) -> Tensor | None:
        return None if x_BT is None else x_BT[batch].repeat_interleave(n_keys, dim=0)

    B_YTN, C_YTN = by_head(student.B_BTHN), by_head(student.C_BTHN)
    step_YT1 = torch.ones_like(B_YTN[..., :1]) if student.step_BTH is None else by_head(student.step_BTH)[..., None]
    start_ZT, valid_ZT = by_key(target.start_BT), by_key(target.valid_BT)
    if valid_ZT is not None:
        invalid_YT1 = ~valid_ZT.repeat_interleave(target.shared, dim=0)[..., None]
        B_YTN, C_YTN, step_YT1 = (x.masked_fill(invalid_YT1, 0) for x in (B_YTN, C_YTN, step_YT1))
    own_YT = dot(B_YTN, C_YTN) * step_YT1.squeeze(-1)
    if student.skip_H is not None:
        own_YT += student.skip_H[heads].to(dtype).repeat(n_sequences)[:, None]
    if valid_ZT is not None:
        own_YT.masked_fill_(invalid_YT1.squeeze(-1), 0)
    q_BKGTD = target.q_BHTD[batch, heads].unflatten(1, (n_keys, target.shared))
    return Pair(
        q_ZGTD=q_BKGTD.flatten(0, 1).to(dtype) * target.scaling,
        k_ZTD=target.k_BKTD[batch, keys].flatten(0, 1).to(dtype),
        l_YT=by_head(student.log_decay_BTH).double().cumsum(-1),
        B_YTN=B_YTN,
        C_YTN=C_YTN,
        step_YT1=step_YT1,
        own_YT=own_YT,
        window=target.window,
        softcap=target.softcap,
        start_ZT=start_ZT,
        starts=None if start_ZT is None else start_ZT.tolist(),
        valid_ZT=valid_ZT,
    )


def dot(x_YTN: Tensor, y_YTN: Tensor) -> Tensor:
    return (x_YTN * y_YTN).sum(-1)
