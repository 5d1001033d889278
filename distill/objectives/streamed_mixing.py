"""The mixing distance without a T×T matrix, with its gradient formed in the same sweep.

`distill.objectives.mixing` defines the loss. `distill.objectives.strips` forms the two matrices, a few rows at a time,
and from them every row's distance and the gradients of ½ Σ_t w_t ‖M_t − A_t‖². What is left for here is a factor a
head, known at the end of the sweep: backward multiplies by it and by what comes from above, and computes nothing twice.

    form             w_t                     distance                           factor
    unsquared        1                       (Σ_t ‖M_t − A_t‖²)^½               1 / distance
    squared          1                       Σ_t ‖M_t − A_t‖²                   2
    row_normalised   1 / (‖M_t − A_t‖ a_t)   1/n Σ_t ‖M_t − A_t‖ / a_t          1 / n

with a_t = max(‖A_t‖, T^-½). Where a distance is 0 its factor (or w_t) is 0.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distill.documents import beginnings
from distill.objectives.matrix_pair import Target
from distill.objectives.mixing import Form, require_form
from distill.objectives.numerics import Reduction, reduce
from distill.objectives.strips import Gradients, inverse, sweep
from distill.ssd.factors import MatrixFactors


def streamed_mixing_distance(
    student: MatrixFactors,
    q_BHTD: Tensor,
    k_BKTD: Tensor,
    valid_BT: Tensor | None = None,
    *,
    scaling: float,
    document_BT: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    form: Form = "unsquared",
    reduction: Reduction = "mean",
) -> Tensor:
    """`mixing_distance(M, attention_matrix(q, k))` of the student's M, from what both matrices are made of.

    Args:
        student: factors of M, any float dtype; H heads. All of them get gradients.
        q_BHTD: (B, H, T, D) queries after norm and rotary embedding; a constant.
        k_BKTD: (B, K, T, D) keys likewise, one for every H/K query heads in a row (or K = H); a constant.
        valid_BT: (B, T) bool; rows and columns of invalid tokens are left out. None means all count.
        scaling: factor on the scores, usually D^-0.5.
        document_BT: (B, T) integer; where it changes a new document begins. Neither side sees past its beginning.
        window: the teacher's token sees itself and the ``window - 1`` tokens before it; None means all.
        softcap: the teacher's scores become ``softcap * tanh(scores / softcap)``; None means uncapped.
        form: ``unsquared``, ``squared`` or ``row_normalised``, as `distill.objectives.mixing` defines them.
        reduction: "mean" over batch × heads; "sum" over the batch of the mean over heads.

    Returns:
        A scalar in fp32 (fp64 for fp64 inputs), also under autocast. Where the two matrices are equal the gradient is
        exactly 0. It can be differentiated once.

    Raises:
        ValueError: shapes that do not belong together, another form, or another reduction.
    """
    require_form(form)
    _require_shapes(student, q_BHTD, k_BKTD)
    start_BT = None if document_BT is None else beginnings(document_BT)
    if valid_BT is not None and bool(valid_BT.all()):
        valid_BT = None
    target = Target(q_BHTD.detach(), k_BKTD.detach(), scaling, window, softcap, start_BT, valid_BT)
    factors = student.tensors()
    wanted = torch.is_grad_enabled() and any(factor is not None and factor.requires_grad for factor in factors)
    distance_BH = _Distance.apply(*factors, target, form, wanted)
    return reduce(distance_BH.mean(dim=1).sum(), distance_BH.shape[0], reduction)


def _require_shapes(student: MatrixFactors, q_BHTD: Tensor, k_BKTD: Tensor) -> None:
    B, H, T, D = q_BHTD.shape
    n_keys = k_BKTD.shape[1]
    if k_BKTD.shape != (B, n_keys, T, D) or H % n_keys:
        raise ValueError(
            f"queries {tuple(q_BHTD.shape)} and keys {tuple(k_BKTD.shape)} must agree in batch, length and width, and"
            " the query heads must be a multiple of the key heads"
        )
    if student.log_decay_BTH.shape != (B, T, H) or student.B_BTHN.shape[:3] != (B, T, H):
        raise ValueError(
            f"the student's factors must have the batch, length and heads of the queries, {(B, T, H)}, not"
            f" {tuple(student.log_decay_BTH.shape)} (log_decay) and {tuple(student.B_BTHN.shape[:3])} (B)"
        )


class _Distance(torch.autograd.Function):
    """(B, H) distances; forward forms the gradients, backward scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        log_decay_BTH: Tensor,
        B_BTHN: Tensor,
        C_BTHN: Tensor,
        step_BTH: Tensor | None,
        skip_H: Tensor | None,
        target: Target,
        form: Form,
        wanted: bool,
    ) -> Tensor:
        factors = (log_decay_BTH, B_BTHN, C_BTHN, step_BTH, skip_H)
        # Autocast would run the products in 16 bits whatever the inputs are.
        with torch.autocast(B_BTHN.device.type, enabled=False):
            rows_BHT, gradients = sweep(MatrixFactors(*factors), target, by_row=form == "row_normalised", wanted=wanted)
            distance_BH, factor_BH = _gather(rows_BHT, target.valid_BT, form)
        if gradients is not None:
            ctx.save_for_backward(factor_BH, *gradients)
            ctx.dtypes = [None if factor is None else factor.dtype for factor in factors]
        return distance_BH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_BH: Tensor) -> tuple[Tensor | None, ...]:
        factor_BH, *saved = ctx.saved_tensors
        *of_positions, of_skip_BH = Gradients(*saved)
        scale_BH = upstream_BH * factor_BH
        scale_B1H, scale_B1H1 = scale_BH[:, None], scale_BH[:, None, :, None]
        # One after the other: of a 16-bit factor's gradient no more than one is there in fp32 besides what was kept.
        returned = [
            ((scale_B1H if gradient.ndim == 3 else scale_B1H1) * gradient).to(dtype) if needed else None
            for gradient, dtype, needed in zip(of_positions, ctx.dtypes, ctx.needs_input_grad, strict=False)
        ]
        of_skip_H = (scale_BH * of_skip_BH).sum(dim=0)
        returned.append(of_skip_H.to(ctx.dtypes[4]) if ctx.needs_input_grad[4] else None)
        return *returned, None, None, None


def _gather(rows_BHT: Tensor, valid_BT: Tensor | None, form: Form) -> tuple[Tensor, Tensor]:
    """(distance, factor), both (B, H), from the rows' squares or, for `row_normalised`, their relative errors."""
    total_BH = rows_BHT.sum(dim=-1)
    if form == "row_normalised":
        rows = torch.full_like(total_BH, rows_BHT.shape[-1]) if valid_BT is None else valid_BT.sum(dim=1)[:, None]
        per_row_BH = 1 / rows.clamp(min=1).to(total_BH.dtype).expand_as(total_BH)
        return total_BH * per_row_BH, per_row_BH
    if form == "squared":
        return total_BH, torch.full_like(total_BH, 2)
    distance_BH = total_BH.sqrt()
    return distance_BH, inverse(distance_BH)
