"""The losses of ``logits.py`` and ``topk.py`` from hidden states: the same numbers, without the logits of a batch.

    logit_loss(W h, W* h*, …)   =   logit_loss_through_heads(h, W, h*, W*, …)
    topk_loss(W h, top k, …)    =   topk_loss_through_head(h, W, top k, …)

h are the final hidden states at scored positions alone: padding and the last token of a document never meet the head.
How a chunk is made and sent backward stands in ``chunked.py``; divergences over the vocabulary in ``by_hand.py``.

Over the k + 1 outcomes of a cached teacher, with the kept tokens S, g_j = ∂D/∂log q̃_j, G = Σ_j g_j, and the student's
tail r = softmax(z_v for v ∉ S):

    q_v = q_∗ r_v,   log q_∗ = log Σ_{v∉S} eᶻ − log Σ eᶻ
    ∂D/∂z_v = g_v − G q_v                for v ∈ S
    ∂D/∂z_v = r_v (g_∗ − G q_∗)          for v ∉ S

so one softmax, over the tail, is all that touches the whole vocabulary.

N scored positions, n of a chunk, D width, V vocabulary, K kept tokens, J = K + 1 outcomes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.objectives import by_hand, logits, topk
from distill.objectives.by_hand import Buffers
from distill.objectives.chunked import Head, loss_sum
from distill.objectives.numerics import Reduction, reduce


def logit_loss_through_heads(
    student_ND: Tensor,
    student_head: Head,
    teacher_ND: Tensor,
    teacher_head: Head,
    target_N: Tensor,
    *,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    ce_weight: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Mean over positions of the divergence, mixed with the cross entropy of the next token.

    Args:
        student_ND: (N, D) final hidden states at scored positions, any float dtype; N may be 0.
        student_head: gradients flow into its weight and bias.
        teacher_ND: (N, D*) the teacher's at the same positions, a constant; its width may be another.
        teacher_head: over the same vocabulary, a constant; its product is in its own dtype, also under autocast.
        target_N: (N,) int64, the token that follows each position.
        divergence: a key of ``DIVERGENCES``.
        temperature: τ > 0, on both sides, with τ² in front.
        ce_weight: w between 0 and 1.
        reduction: "mean" over positions, or their "sum".

    Returns:
        A scalar in fp32 (fp64 for fp64 inputs), to be sent backward once at most.

    Raises:
        UserError: a setting outside its range.
        ValueError: another vocabulary or number of positions, or another reduction.
    """
    logits.require_settings(divergence, temperature, ce_weight, labels_given=True)
    if teacher_head.vocabulary != student_head.vocabulary or not len(student_ND) == len(teacher_ND) == len(target_N):
        raise ValueError(
            f"student and teacher must predict as many tokens at as many positions, not {student_head.vocabulary} at"
            f" {len(student_ND)} and {teacher_head.vocabulary} at {len(teacher_ND)}, for {len(target_N)} targets"
        )
    loss = _BesideTeacher(
        teacher_ND.detach().to(teacher_head.weight_VD.dtype),
        _constant(teacher_head),
        target_N,
        by_hand.DIVERGENCES[divergence],
        temperature,
        ce_weight,
    )
    return reduce(loss_sum(student_ND, student_head, loss), len(target_N), reduction)


def topk_loss_through_head(
    student_ND: Tensor,
    student_head: Head,
    ids_NK: Tensor,
    log_probs_NK: Tensor,
    log_tail_N: Tensor,
    target_N: Tensor,
    *,
    divergence: str = "forward_kl",
    ce_weight: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Mean over positions of the divergence over k + 1 outcomes, mixed with the next token's cross entropy.

    Args:
        student_ND: (N, D) final hidden states at scored positions, any float dtype; N may be 0.
        student_head: gradients flow into its weight and bias.
        ids_NK: (N, K) int64, the kept tokens of each position, none twice; see ``topk.TopK``.
        log_probs_NK: (N, K) the teacher's log-probabilities of them, any float dtype.
        log_tail_N: (N,) log of the teacher's mass outside them; −inf for none.
        target_N: (N,) int64, the token that follows each position.
        divergence: a key of ``DIVERGENCES``.
        ce_weight: w between 0 and 1.
        reduction: "mean" over positions, or their "sum".

    Returns:
        A scalar in fp32 (fp64 for fp64 inputs), to be sent backward once at most.

    Raises:
        UserError: a setting outside its range.
        ValueError: shapes that do not belong together, or another reduction.
    """
    topk.require_settings(divergence, ce_weight)
    if ids_NK.shape != log_probs_NK.shape or not len(ids_NK) == len(log_tail_N) == len(target_N) == len(student_ND):
        given = ", ".join(str(tuple(x.shape)) for x in (student_ND, ids_NK, log_probs_NK, log_tail_N, target_N))
        raise ValueError(f"hidden states (N, D), ids and log_probs (N, K), log_tail and targets (N,), not {given}")
    teacher_NJ = torch.cat([log_probs_NK, log_tail_N[:, None]], -1).detach()
    loss = _BesideTopK(ids_NK, teacher_NJ, target_N, logits.DIVERGENCES[divergence], ce_weight)
    return reduce(loss_sum(student_ND, student_head, loss), len(target_N), reduction)


@dataclass(frozen=True)
class _BesideTeacher:
    """``ChunkLoss`` for a teacher that computes: its logits too are made for the chunk alone."""

    teacher_ND: Tensor
    head: Head
    target_N: Tensor
    divergence: by_hand.Divergence
    temperature: float
    ce_weight: float

    def __call__(self, logits_NV: Tensor, rows: slice, buffers: Buffers) -> tuple[Tensor, Tensor]:
        if self.ce_weight == 1:
            gradient_NV = buffers("entropy")
            return by_hand.cross_entropy(logits_NV, self.target_N[rows], gradient_NV), gradient_NV
        if self.ce_weight == 0:
            return self._divergence(logits_NV, rows, buffers)
        entropy_NV = buffers("entropy")
        entropy_N = by_hand.cross_entropy(logits_NV, self.target_N[rows], entropy_NV)
        loss_N, gradient_NV = self._divergence(logits_NV, rows, buffers)
        gradient_NV.add_(entropy_NV, alpha=self.ce_weight)
        return loss_N.add_(entropy_N, alpha=self.ce_weight), gradient_NV

    def _divergence(self, logits_NV: Tensor, rows: slice, buffers: Buffers) -> tuple[Tensor, Tensor]:
        """With its factor (1 − w) τ²; of the gradient one τ is spent on the logits' own scale."""
        share, temperature = 1 - self.ce_weight, self.temperature
        teacher_NV = self.head.logits(self.teacher_ND[rows], buffers("teacher"))
        if temperature != 1:
            teacher_NV.div_(temperature)
            logits_NV.div_(temperature)
        loss_N, gradient_NV = self.divergence(teacher_NV, logits_NV, buffers)
        if share * temperature != 1:
            gradient_NV.mul_(share * temperature)
        return loss_N.mul_(share * temperature**2), gradient_NV


@dataclass(frozen=True)
class _BesideTopK:
    """``ChunkLoss`` for a teacher of which the likeliest tokens are known."""

    ids_NK: Tensor
    teacher_NJ: Tensor
    target_N: Tensor
    divergence: Callable[[Tensor, Tensor], Tensor]
    ce_weight: float

    def __call__(self, logits_NV: Tensor, rows: slice, buffers: Buffers) -> tuple[Tensor, Tensor]:
        ids_NK, target_N1, w = self.ids_NK[rows], self.target_N[rows, None], self.ce_weight
        nothing = topk.nothing(logits_NV)
        kept_NK, of_target_N1 = logits_NV.gather(-1, ids_NK), logits_NV.gather(-1, target_N1)
        r_NV, log_others_N = by_hand.softmax(logits_NV.scatter_(-1, ids_NK, nothing), buffers("tail"))
        log_q_NJ = torch.cat([kept_NK, log_others_N[:, None]], -1)
        log_z_N1 = log_q_NJ.logsumexp(-1, keepdim=True)
        log_q_NJ -= log_z_N1
        p_NJ = self.teacher_NJ[rows].to(log_q_NJ.dtype).clamp(min=nothing)

        loss_N, g_NJ = _with_gradient(self.divergence, p_NJ, log_q_NJ)
        # The cross entropy's gradient, q less the target, is as if w were taken from G.
        g_NJ.mul_(1 - w)
        by_outcome_NJ = g_NJ - log_q_NJ.exp() * (g_NJ.sum(-1, keepdim=True) - w)
        gradient_NV = r_NV.mul_(by_outcome_NJ[:, -1:]).scatter_(-1, ids_NK, by_outcome_NJ[:, :-1])
        gradient_NV.scatter_add_(-1, target_N1, gradient_NV.new_full(target_N1.shape, -w))
        return (1 - w) * loss_N + w * (log_z_N1 - of_target_N1)[:, 0], gradient_NV


def _with_gradient(
    divergence: Callable[[Tensor, Tensor], Tensor], p_NJ: Tensor, log_q_NJ: Tensor
) -> tuple[Tensor, Tensor]:
    """The divergence of each row, and its gradient for every log q̃ taken alone; the outcomes are few."""
    with torch.enable_grad():
        leaf_NJ = log_q_NJ.detach().requires_grad_()
        loss_N = divergence(p_NJ, leaf_NJ)
        (g_NJ,) = torch.autograd.grad(loss_N.sum(), leaf_NJ)
    return loss_N.detach(), g_NJ


def _constant(head: Head) -> Head:
    return Head(
        head.weight_VD.detach(),
        None if head.bias_V is None else head.bias_V.detach(),
        head.scale,
        head.softcap,
    )
