"""What the three losses share: full precision, equal shapes, and the two reductions."""

from typing import Literal, get_args

import torch
from torch import Tensor

Reduction = Literal["mean", "sum"]


def full_precision(x: Tensor) -> Tensor:
    """The same values in fp32, or in fp64 when they already are; no copy if nothing changes."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def require_same_shape(student: Tensor, teacher: Tensor) -> None:
    """Refuse what broadcasting would silently accept.

    Raises:
        ValueError: the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher must have the same shape, not {tuple(student.shape)} and {tuple(teacher.shape)}"
        )


def reduce(total: Tensor, count: Tensor | float, reduction: Reduction) -> Tensor:
    """``total`` for "sum", ``total / count`` for "mean"; a mean over nothing is 0.

    Raises:
        ValueError: another reduction.
    """
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction is 'mean' or 'sum', not {reduction!r}")
    if reduction == "sum":
        return total
    return total / torch.as_tensor(count, device=total.device).clamp(min=1)
