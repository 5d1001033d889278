"""Logit distillation: the student's next-token distribution beside the teacher's.

Per scored position, with p = softmax(teacher / τ) and q = softmax(student / τ):

    loss = (1 − w) · τ² · D(p, q) + w · CE(softmax(student), next token)

    forward_kl   D = KL(p‖q) = Σ_v p_v (log p_v − log q_v)       covers all that the teacher may say
    reverse_kl   D = KL(q‖p)                                     keeps to what the teacher does say
    jsd          D = ½ KL(p‖m) + ½ KL(q‖m),   m = ½ (p + q)      symmetric, at most log 2

τ² keeps the size of the gradient the same at every temperature (Hinton, Vinyals, Dean 2015, arXiv 1503.02531,
section 2). The temperature acts on both sides, never on the cross entropy. MOHAWK's third stage is forward_kl
with τ = 1 and w = 0 (arXiv 2408.10189).

Position t is scored when it has a next token to predict: ``labels[t + 1] != -100``.
B batch, T tokens, N = B·T positions, V vocabulary.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from torch.utils.checkpoint import checkpoint

from distill.errors import UserError
from distill.objectives.numerics import Reduction, full_precision, reduce, require_same_shape

IGNORED = -100
"""The label of a token that nothing has to predict (Hugging Face's convention)."""

CHUNK_ELEMENTS = 2**25
"""Logits turned into fp32 at a time (128 MiB a copy); backward computes each chunk anew."""


def forward_kl(teacher_NV: Tensor, student_NV: Tensor) -> Tensor:
    """KL(teacher‖student) per position, (N,), from two (N, V) log-probabilities."""
    return (teacher_NV.exp() * (teacher_NV - student_NV)).sum(-1)


def reverse_kl(teacher_NV: Tensor, student_NV: Tensor) -> Tensor:
    """KL(student‖teacher) per position, (N,), from two (N, V) log-probabilities."""
    return forward_kl(student_NV, teacher_NV)


def jsd(teacher_NV: Tensor, student_NV: Tensor) -> Tensor:
    """Jensen-Shannon divergence per position, (N,), from two (N, V) log-probabilities."""
    middle_NV = torch.logaddexp(teacher_NV, student_NV) - math.log(2)
    return (forward_kl(teacher_NV, middle_NV) + forward_kl(student_NV, middle_NV)) / 2


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
}


def scored_positions(labels_BT: Tensor) -> Tensor:
    """(B, T) bool: which positions have a next token to predict. Its sum is what "mean" divides by."""
    return next_labels(labels_BT) != IGNORED


def logit_loss(
    student_BTV: Tensor,
    teacher_BTV: Tensor,
    labels_BT: Tensor | None = None,
    *,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    ce_weight: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Mean over scored positions of the divergence, mixed with the cross entropy of the next token.

    Args:
        student_BTV: (B, T, V) finite logits, any float dtype.
        teacher_BTV: (B, T, V) finite logits, a constant: no gradient flows into it.
        labels_BT: (B, T) int64, unshifted, -100 where a token is not to be predicted. None scores every
            position without a shift.
        divergence: a key of ``DIVERGENCES``.
        temperature: τ > 0, on both sides, with τ² in front.
        ce_weight: w between 0 and 1; above 0 it needs labels.
        reduction: "mean" over scored positions, or their "sum".

    Returns:
        A scalar in fp32 (fp64 for fp64 inputs). No fp32 copy larger than a chunk outlives its chunk.

    Raises:
        UserError: a setting outside its range.
        ValueError: different shapes, or another reduction.
    """
    require_settings(divergence, temperature, ce_weight, labels_BT is not None)
    require_same_shape(student_BTV, teacher_BTV)
    if labels_BT is None:
        targets_BT = torch.zeros(student_BTV.shape[:2], dtype=torch.long, device=student_BTV.device)
    else:
        targets_BT = next_labels(labels_BT)

    def chunk_sum(student_NV: Tensor, teacher_NV: Tensor, target_N: Tensor) -> Tensor:
        return _chunk_sum(student_NV, teacher_NV, target_N, DIVERGENCES[divergence], temperature, ce_weight)

    rows = max(1, CHUNK_ELEMENTS // student_BTV.shape[-1])
    # split, not slices: its backward joins the chunks' gradients once instead of padding each to full size.
    chunks = zip(
        student_BTV.flatten(0, 1).split(rows),
        teacher_BTV.detach().flatten(0, 1).split(rows),
        targets_BT.flatten().split(rows),
        strict=True,
    )
    sums = [checkpoint(chunk_sum, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    return reduce(torch.stack(sums).sum(), (targets_BT != IGNORED).sum(), reduction)


def next_labels(labels_BT: Tensor) -> Tensor:
    """(B, T): the label that each position has to predict; the last position has none."""
    return pad(labels_BT[:, 1:], (0, 1), value=IGNORED)


def _chunk_sum(
    student_NV: Tensor,
    teacher_NV: Tensor,
    target_N: Tensor,
    divergence: Callable[[Tensor, Tensor], Tensor],
    temperature: float,
    ce_weight: float,
) -> Tensor:
    """Sum of the loss over the scored rows of one chunk."""
    unscored_N = target_N == IGNORED
    # Blank unscored rows before the softmax, so that not even a NaN there reaches the gradient.
    student_NV = full_precision(student_NV).masked_fill(unscored_N[:, None], 0)
    teacher_NV = full_precision(teacher_NV).masked_fill(unscored_N[:, None], 0)
    loss_N = student_NV.new_zeros(len(target_N))
    if ce_weight < 1:
        p_NV = (teacher_NV / temperature).log_softmax(-1)
        q_NV = (student_NV / temperature).log_softmax(-1)
        loss_N = loss_N + (1 - ce_weight) * temperature**2 * divergence(p_NV, q_NV)
    if ce_weight > 0:
        # An ignored target gives 0.
        loss_N = loss_N + ce_weight * cross_entropy(student_NV, target_N, reduction="none", ignore_index=IGNORED)
    return loss_N.masked_fill(unscored_N, 0).sum()


def require_settings(divergence: str, temperature: float, ce_weight: float, labels_given: bool) -> None:
    """Refuse a setting outside its range."""
    if divergence not in DIVERGENCES:
        raise UserError(f"divergence {divergence!r} is unknown; allowed: {', '.join(DIVERGENCES)}")
    if not 0 < temperature < math.inf:
        raise UserError(f"temperature is {temperature}; it must be a positive number")
    if not 0 <= ce_weight <= 1:
        raise UserError(f"ce_weight is {ce_weight}; it must lie between 0 and 1")
    if ce_weight > 0 and not labels_given:
        raise UserError(f"ce_weight is {ce_weight}, but the cross entropy needs labels and none were given")
