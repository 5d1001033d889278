"""Pairs of matrices to compare, by what they are made of; and their distance with both written out."""

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.objectives import attention_matrix, mixing_distance
from distill.objectives.mixing import Form
from distill.ssd import mixing_matrix
from distill.ssd.factors import MatrixFactors


def random_pair(
    length: int,
    *,
    batch: int = 2,
    heads: int = 4,
    keys: int = 2,
    width: int = 5,
    state: int = 3,
    decay: float = 0.3,
    step: bool = True,
    skip: bool = True,
    seed: int = 0,
) -> tuple[MatrixFactors, Tensor, Tensor]:
    """(factors that require gradients, q_BHTD, k_BKTD), all in fp64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    factors = MatrixFactors(
        log_decay_BTH=-decay * normal(batch, length, heads).abs(),
        B_BTHN=normal(batch, length, heads, state) * state**-0.5,
        C_BTHN=normal(batch, length, heads, state),
        step_BTH=normal(batch, length, heads).abs() if step else None,
        skip_H=normal(heads) if skip else None,
    )
    for factor in given(factors):
        factor.requires_grad_()
    return factors, normal(batch, heads, length, width), normal(batch, keys, length, width)


def given(factors: MatrixFactors) -> list[Tensor]:
    return [factor for factor in factors.tensors() if factor is not None]


def cast(factors: MatrixFactors, dtype: torch.dtype) -> MatrixFactors:
    return MatrixFactors(*(x if x is None else x.detach().to(dtype).requires_grad_() for x in factors.tensors()))


def written_out(factors: MatrixFactors, document_BT: Tensor | None = None) -> Tensor:
    """M of the factors, (B, H, T, T)."""
    resets_BT = None if document_BT is None else F.pad(document_BT.diff(dim=1) != 0, (1, 0))
    M_BHTT = mixing_matrix(factors.log_decay_BTH, factors.B_BTHN, factors.C_BTHN, resets_BT=resets_BT)
    if factors.step_BTH is not None:
        M_BHTT = M_BHTT * factors.step_BTH.mT[:, :, None, :]
    if factors.skip_H is not None:
        M_BHTT = M_BHTT + factors.skip_H[:, None, None] * torch.eye(M_BHTT.shape[-1], dtype=M_BHTT.dtype)
    return M_BHTT


def distance_written_out(
    factors: MatrixFactors,
    q_BHTD: Tensor,
    k_BKTD: Tensor,
    valid_BT: Tensor | None = None,
    *,
    scaling: float,
    document_BT: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    form: Form = "unsquared",
) -> Tensor:
    """`streamed_mixing_distance`, through both T×T matrices."""
    k_BHTD = k_BKTD.repeat_interleave(q_BHTD.shape[1] // k_BKTD.shape[1], dim=1)
    A_BHTT = attention_matrix(q_BHTD, k_BHTD, scaling=scaling, document_BT=document_BT, window=window, softcap=softcap)
    return mixing_distance(written_out(factors, document_BT), A_BHTT, valid_BT, form=form)
