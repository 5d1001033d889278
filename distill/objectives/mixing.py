"""Matrix orientation: the student's mixing matrix beside the teacher's attention matrix, head by head.

A sequence mixer is a T×T matrix applied to values: for attention the post-softmax weights, for a state-space
layer the semiseparable matrix of its scan. Both are matched as matrices, before any value is seen:

    loss = 1/(B·H) Σ_{b,h} distance_bh                M student, A teacher

    unsquared        distance = ‖M − A‖_F             MOHAWK's
    squared          distance = ‖M − A‖_F²
    row_normalised   distance = 1/n Σ_t ‖M_t − A_t‖₂ / max(‖A_t‖₂, T^-½)     n valid rows t

    A = softmax(mask(cap(scaling · Q Kᵀ)))            cap(x) = c·tanh(x/c) where the family caps its scores

The first two grow with T; and since a row of attention has a norm between t^-½ (even) and 1 (a single peak), a diffuse
head's norm is mostly that of its first rows. `row_normalised` is each row's relative error: every row counts alike,
M = 0 costs 1 at every length, and, as in stage 2, one bad row weighs as its distance, not its square. T^-½ is the least
norm that a row of T weights with sum 1 can have; it acts where padding took the weight of a row, and nowhere else.

Index convention: row t (a query, an output position), column s ≤ t (a key, an input position).
B batch, H query heads, T = S tokens, D width of a head.
Source: MOHAWK, Bick et al. 2024 (arXiv 2408.10189), its stage 1, "matrix orientation".

This is the readable form, which holds both matrices. Training uses `distill.objectives.streamed_mixing`.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from distill.objectives.numerics import Reduction, full_precision, reduce, require_same_shape

Form = Literal["unsquared", "squared", "row_normalised"]


def require_form(form: str) -> None:
    """Refuse a form that there is not.

    Raises:
        ValueError: another than the three.
    """
    if form not in get_args(Form):
        raise ValueError(f"form is {', '.join(map(repr, get_args(Form)))}, not {form!r}")


def mixing_distance(
    student_BHTS: Tensor,
    teacher_BHTS: Tensor,
    valid_BT: Tensor | None = None,
    *,
    form: Form = "unsquared",
    reduction: Reduction = "mean",
) -> Tensor:
    """Mean over batch and heads of the distance between mixing matrices.

    Args:
        student_BHTS: (B, H, T, T), any float dtype.
        teacher_BHTS: (B, H, T, T), a constant: no gradient flows into it.
        valid_BT: (B, T) bool; rows and columns of invalid tokens are left out. None means all count.
        form: one of the three above.
        reduction: "mean" over batch × heads; "sum" over the batch of the mean over heads.

    Returns:
        A scalar in fp32 (fp64 for fp64 inputs). Where the two matrices are equal the gradient is exactly 0.

    Raises:
        ValueError: different shapes, another form, or another reduction.
    """
    require_form(form)
    require_same_shape(student_BHTS, teacher_BHTS)
    teacher_BHTS = full_precision(teacher_BHTS.detach())
    difference_BHTS = full_precision(student_BHTS) - teacher_BHTS
    if valid_BT is not None:
        left_out_B1TS = ~(valid_BT[:, None, :, None] & valid_BT[:, None, None, :])
        difference_BHTS = difference_BHTS.masked_fill(left_out_B1TS, 0)
        teacher_BHTS = teacher_BHTS.masked_fill(left_out_B1TS, 0)
    if form == "row_normalised":
        distance_BH = _relative_error(difference_BHTS, teacher_BHTS, valid_BT)
    elif form == "squared":
        distance_BH = difference_BHTS.square().sum(dim=(-2, -1))
    else:
        # As in hidden.py: the norm whose gradient at 0 is 0.
        distance_BH = torch.linalg.vector_norm(difference_BHTS, dim=(-2, -1))
    return reduce(distance_BH.mean(dim=1).sum(), distance_BH.shape[0], reduction)


def _relative_error(difference_BHTS: Tensor, teacher_BHTS: Tensor, valid_BT: Tensor | None) -> Tensor:
    """(B, H): the mean over valid rows of a row's relative error."""
    length = difference_BHTS.shape[-1]
    size_BHT = torch.linalg.vector_norm(teacher_BHTS, dim=-1).clamp_min(length**-0.5)
    error_BHT = torch.linalg.vector_norm(difference_BHTS, dim=-1) / size_BHT
    rows: Tensor | float = length if valid_BT is None else valid_BT.sum(dim=1, keepdim=True)
    return reduce(error_BHT.sum(dim=-1), rows, "mean")


def attention_matrix(
    q_BHTD: Tensor,
    k_BHTD: Tensor,
    *,
    scaling: float,
    document_BT: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Post-softmax causal attention weights, as eager attention computes them.

    Args:
        q_BHTD: (B, H, T, D) queries after norm and rotary embedding.
        k_BHTD: (B, H, T, D) keys likewise, key heads already repeated for every query head.
        scaling: factor on the scores, usually D^-0.5.
        document_BT: (B, T) integer, one number per document; a token sees its own document only.
        window: a token sees itself and the ``window - 1`` tokens before it; None means all.
        softcap: scores become ``softcap * tanh(scores / softcap)``; None means uncapped.

    Returns:
        (B, H, T, T) in fp32 (fp64 for fp64 inputs), also under autocast. Every row sums to 1.

    Raises:
        ValueError: queries and keys of different shapes.
    """
    require_same_shape(q_BHTD, k_BHTD)
    visible_BTS = _visible(q_BHTD.shape[-2], document_BT, window, q_BHTD.device)
    # Autocast would run the product in 16 bits whatever the inputs are.
    with torch.autocast(q_BHTD.device.type, enabled=False):
        scores_BHTS = scaling * full_precision(q_BHTD) @ full_precision(k_BHTD).transpose(-1, -2)
        if softcap is not None:
            scores_BHTS = softcap * torch.tanh(scores_BHTS / softcap)
        # A token always sees itself, so no row is all -inf.
        return scores_BHTS.masked_fill(~visible_BTS[:, None], -torch.inf).softmax(dim=-1)


def _visible(length: int, document_BT: Tensor | None, window: int | None, device: torch.device) -> Tensor:
    """(B or 1, T, T) bool: may row t look at column s?"""
    position_T = torch.arange(length, device=device)
    distance_TS = position_T[:, None] - position_T[None, :]
    visible_TS = distance_TS >= 0
    if window is not None:
        visible_TS &= distance_TS < window
    if document_BT is None:
        return visible_TS[None]
    return visible_TS & (document_BT[:, :, None] == document_BT[:, None, :])
