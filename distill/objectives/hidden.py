"""Hidden-state alignment: the student's layer output beside the teacher's, token by token.

    loss = 1/N Σ_{b,t valid} ‖h_bt − h*_bt‖₂          N = number of valid tokens

h is the student's output and h* the teacher's on the same input. The norm is *not* squared: one outlier token
(the first of a sequence often is) weighs as much as its distance, not as its square.

Or before the output projection, head by head, with o the heads' outputs side by side:

    loss = 1/N Σ_{b,t valid} 1/(H P) ‖o_bt − o*_bt‖²

That is the mean squared error, in which every head weighs as much as its outputs are large.

B batch, T tokens, D width, H heads, P channels a head. Sources: MOHAWK, Bick et al. 2024 (arXiv 2408.10189), its
stage 2, "hidden-state alignment"; mmMamba (arXiv 2502.13145), its stages 1 and 2, which take 1000/L times the second
loss summed over L layers.
"""

import torch
from torch import Tensor

from distill.objectives.numerics import Reduction, full_precision, reduce, require_same_shape


def hidden_distance(
    student_BTD: Tensor,
    teacher_BTD: Tensor,
    valid_BT: Tensor | None = None,
    *,
    reduction: Reduction = "mean",
) -> Tensor:
    """Mean over valid tokens of the L2 distance over the width.

    Args:
        student_BTD: (B, T, D), any float dtype.
        teacher_BTD: (B, T, D), a constant: no gradient flows into it.
        valid_BT: (B, T) bool, False at padding; None means every token counts.
        reduction: "mean" over valid tokens, or their "sum".

    Returns:
        A scalar in fp32 (fp64 for fp64 inputs). Where the two states are equal the gradient is exactly 0.

    Raises:
        ValueError: different shapes, or another reduction.
    """
    difference_BTD, count = _difference(student_BTD, teacher_BTD, valid_BT)
    # vector_norm, unlike sqrt of a sum of squares, has the subgradient 0 at 0.
    distance_BT = torch.linalg.vector_norm(difference_BTD, dim=-1)
    return reduce(distance_BT.sum(), count, reduction)


def head_distance(
    student_BTI: Tensor,
    teacher_BTI: Tensor,
    valid_BT: Tensor | None = None,
    *,
    reduction: Reduction = "mean",
) -> Tensor:
    """Mean over valid tokens of the mean squared error over all heads' channels.

    Args:
        student_BTI: (B, T, H·P), any float dtype.
        teacher_BTI: (B, T, H·P), a constant.
        valid_BT, reduction: as `hidden_distance`.

    Returns:
        A scalar in fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: different shapes, or another reduction.
    """
    difference_BTI, count = _difference(student_BTI, teacher_BTI, valid_BT)
    return reduce(difference_BTI.square().sum() / difference_BTI.shape[-1], count, reduction)


def _difference(student_BTD: Tensor, teacher_BTD: Tensor, valid_BT: Tensor | None) -> tuple[Tensor, Tensor | float]:
    """In full precision, 0 at padding; and the number of valid tokens."""
    require_same_shape(student_BTD, teacher_BTD)
    difference_BTD = full_precision(student_BTD) - full_precision(teacher_BTD.detach())
    if valid_BT is None:
        return difference_BTD, student_BTD.shape[0] * student_BTD.shape[1]
    return difference_BTD.masked_fill(~valid_BT[..., None], 0), valid_BT.sum()
