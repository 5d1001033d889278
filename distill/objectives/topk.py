"""Logit distillation from a cache: the teacher's k likeliest tokens, and all others together as one outcome.

Per scored position, with p = softmax(teacher), q = softmax(student), and S the k likeliest tokens under p:

    p_∗ = 1 − Σ_{v∈S} p_v      the teacher's tail mass, kept beside its top k
    q_∗ = Σ_{v∉S} q_v          the student's mass on the same tokens

    loss = (1 − w) · D(p̃, q̃) + w · CE(q, next token)      p̃ = (p_v for v ∈ S, p_∗),  q̃ = (q_v for v ∈ S, q_∗)

D is any divergence of ``logits.py``, over k + 1 outcomes instead of V. Lumping outcomes can only lower it (the log-sum
inequality: Cover and Thomas, Elements of Information Theory, theorem 2.7.1): D(p̃, q̃) ≤ D(p, q), and both are equal
where the student shares its tail out as the teacher does, so always at k = V. The gradient of forward_kl,

    ∂D/∂z_v = q_v − p_v              for v ∈ S
    ∂D/∂z_v = q_v − p_∗ · q_v/q_∗    for v ∉ S,

drives q_v to p_v itself in S. Without the tail the target would be p_v / Σ_S p: every kept token too likely, the bias
of plain top-k distillation (Anshumann et al. 2025, "Sparse Logit Sampling", arXiv 2503.16870). What stays unknown is
how the teacher shares p_∗ out; there the student keeps its own proportions.

There is no temperature: p at another temperature is not a function of the k + 1 numbers that were kept.

B batch, T tokens, N = B·T positions, V vocabulary, K kept tokens, J = K + 1 outcomes.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from torch.utils.checkpoint import checkpoint

from distill.errors import UserError
from distill.objectives import logits
from distill.objectives.logits import DIVERGENCES, IGNORED
from distill.objectives.numerics import Reduction, full_precision, reduce


class TopK(NamedTuple):
    """A teacher's predictions, cut down to its likeliest tokens.

    Attributes:
        ids_BTK: int64, in any order.
        log_probs_BTK: of these tokens, over the whole vocabulary.
        log_tail_BT: log of the mass of all others; −inf, or a finite number that exp turns into 0, where there are
            none.
    """

    ids_BTK: Tensor
    log_probs_BTK: Tensor
    log_tail_BT: Tensor


@torch.no_grad()
def top_k_and_tail(teacher_BTV: Tensor, k: int) -> TopK:
    """The k likeliest tokens at every position, the whole vocabulary if it has no more, in fp32 (fp64 for fp64)."""
    size_BT, vocabulary = teacher_BTV.shape[:-1], teacher_BTV.shape[-1]

    def cut(chunk_NV: Tensor) -> tuple[Tensor, Tensor]:
        chunk_NV = full_precision(chunk_NV)
        ids_NK = chunk_NV.topk(min(k, vocabulary)).indices
        return ids_NK, _outcomes(chunk_NV, ids_NK)

    chunks = [cut(chunk_NV) for chunk_NV in teacher_BTV.flatten(0, -2).split(_chunk_rows(vocabulary))]
    ids_NK, outcomes_NJ = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    log_probs_NK, log_tail_N = outcomes_NJ[:, :-1], outcomes_NJ[:, -1]
    return TopK(ids_NK.view(*size_BT, -1), log_probs_NK.reshape(*size_BT, -1), log_tail_N.reshape(size_BT))


def topk_loss(
    student_BTV: Tensor,
    ids_BTK: Tensor,
    log_probs_BTK: Tensor,
    log_tail_BT: Tensor,
    labels_BT: Tensor,
    *,
    divergence: str = "forward_kl",
    ce_weight: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Mean over scored positions of the divergence over k + 1 outcomes, mixed with the next token's cross entropy.

    Args:
        student_BTV: (B, T, V) finite logits, any float dtype.
        ids_BTK: (B, T, K) int64, the kept tokens of each position, none twice; see ``TopK``.
        log_probs_BTK: (B, T, K) the teacher's log-probabilities of them, any float dtype.
        log_tail_BT: (B, T) log of the teacher's mass outside them; −inf for none.
        labels_BT: (B, T) int64, unshifted, -100 where a token is not to be predicted.
        divergence: a key of ``DIVERGENCES``.
        ce_weight: w between 0 and 1.
        reduction: "mean" over scored positions, or their "sum".

    Returns:
        A scalar in fp32 (fp64 for fp64 logits). No fp32 copy larger than a chunk outlives its chunk.

    Raises:
        UserError: a setting outside its range.
        ValueError: shapes that do not belong together, or another reduction.
    """
    require_settings(divergence, ce_weight)
    _require_shapes(student_BTV, ids_BTK, log_probs_BTK, log_tail_BT)
    targets_BT = pad(labels_BT[:, 1:], (0, 1), value=IGNORED)

    def chunk_sum(student_NV: Tensor, ids_NK: Tensor, teacher_NJ: Tensor, target_N: Tensor) -> Tensor:
        return _chunk_sum(student_NV, ids_NK, teacher_NJ, target_N, DIVERGENCES[divergence], ce_weight)

    rows = _chunk_rows(student_BTV.shape[-1])
    teacher_BTJ = torch.cat([log_probs_BTK, log_tail_BT[..., None]], -1).detach()
    # split, not slices: its backward joins the chunks' gradients once instead of padding each to full size.
    chunks = zip(
        *(x.flatten(0, 1).split(rows) for x in (student_BTV, ids_BTK, teacher_BTJ)),
        targets_BT.flatten().split(rows),
        strict=True,
    )
    sums = [checkpoint(chunk_sum, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    return reduce(torch.stack(sums).sum(), (targets_BT != IGNORED).sum(), reduction)


def _chunk_sum(
    student_NV: Tensor,
    ids_NK: Tensor,
    teacher_NJ: Tensor,
    target_N: Tensor,
    divergence: Callable[[Tensor, Tensor], Tensor],
    ce_weight: float,
) -> Tensor:
    """Sum of the loss over the scored rows of one chunk."""
    unscored_N = target_N == IGNORED
    unscored_N1 = unscored_N[:, None]
    # Blank unscored rows before the softmax, so that not even a NaN there reaches the gradient.
    student_NV = full_precision(student_NV).masked_fill(unscored_N1, 0)
    loss_N = student_NV.new_zeros(len(target_N))
    if ce_weight < 1:
        p_NJ = teacher_NJ.to(student_NV.dtype).masked_fill(unscored_N1, 0).clamp(min=nothing(student_NV))
        q_NJ = _outcomes(student_NV, ids_NK.masked_fill(unscored_N1, 0))
        loss_N = loss_N + (1 - ce_weight) * divergence(p_NJ, q_NJ)
    if ce_weight > 0:
        # An ignored target gives 0.
        loss_N = loss_N + ce_weight * cross_entropy(student_NV, target_N, reduction="none", ignore_index=IGNORED)
    return loss_N.masked_fill(unscored_N, 0).sum()


def _outcomes(logits_NV: Tensor, ids_NK: Tensor) -> Tensor:
    """Log-probabilities of each given token and, last, of all others together: (N, J).

    The others are summed themselves: 1 − Σ of the given ones would lose a small tail to rounding.
    """
    log_z_N1 = logits_NV.logsumexp(-1, keepdim=True)
    others_N1 = logits_NV.scatter(-1, ids_NK, nothing(logits_NV)).logsumexp(-1, keepdim=True)
    return torch.cat([logits_NV.gather(-1, ids_NK), others_N1], -1) - log_z_N1


def nothing(like: Tensor) -> float:
    """A logit whose exp is 0. Finite, or the tail of an empty rest would have a gradient of NaN."""
    return torch.finfo(like.dtype).min / 2


def _chunk_rows(vocabulary: int) -> int:
    return max(1, logits.CHUNK_ELEMENTS // vocabulary)


def require_settings(divergence: str, ce_weight: float) -> None:
    """Refuse a setting outside its range."""
    if divergence not in DIVERGENCES:
        raise UserError(f"divergence {divergence!r} is unknown; allowed: {', '.join(DIVERGENCES)}")
    if not 0 <= ce_weight <= 1:
        raise UserError(f"ce_weight is {ce_weight}; it must lie between 0 and 1")


def _require_shapes(student_BTV: Tensor, ids_BTK: Tensor, log_probs_BTK: Tensor, log_tail_BT: Tensor) -> None:
    fits = ids_BTK.shape == log_probs_BTK.shape and ids_BTK.shape[:2] == log_tail_BT.shape == student_BTV.shape[:2]
    if not fits:
        given = ", ".join(str(tuple(x.shape)) for x in (student_BTV, ids_BTK, log_probs_BTK, log_tail_BT))
        raise ValueError(f"logits (B, T, V), ids and log_probs (B, T, K) and log_tail (B, T) must agree, not {given}")
