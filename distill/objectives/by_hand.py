"""Divergences with their gradients, by hand and in place: what ``logits.py`` says, for one chunk, in the fewest passes.

With logits t of the teacher and z of the student, p = softmax(t), q = softmax(z), d = z − t, Z = Σ exp:

    forward_kl   D = Σ p (t − z) − (log Z_t − log Z_z)           ∂D/∂z = q − p
    reverse_kl   D = Σ q d + (log Z_t − log Z_z)                 ∂D/∂z = q (d − Σ q d)
    jsd          D = ½ Σ p u + ½ Σ q v                           ∂D/∂z = ½ q (v − Σ q v)
                 u = log p/m = log 2 − log(1 + eˡ)               l = log q − log p
                 v = log q/m = u + l
    entropy      D = log Z_z − z_y                               ∂D/∂z = q − 1_y

Everything is in the dtype of the logits, fp32 or fp64. At 128K tokens a row no cache holds a chunk, so a pass over it
costs its memory twice: hence buffers that are used again, and log Z from softmax and two maxima instead of a second
sum over exp.

N rows of a chunk, V vocabulary. Arguments and buffers are overwritten, gradients lie in one of them.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Buffers = Callable[[str], Tensor]
"""A scratch tensor (N, V) by name, the same one every time; its content is anything."""

Divergence = Callable[[Tensor, Tensor, Buffers], tuple[Tensor, Tensor]]
"""(t_NV, z_NV, buffers) -> the divergence (N,) and its gradient for z (N, V)."""


def forward_kl(t_NV: Tensor, z_NV: Tensor, buffers: Buffers) -> tuple[Tensor, Tensor]:
    p_NV, log_zt_N = softmax(t_NV, buffers("p"))
    cross_N = t_NV.sub_(z_NV).mul_(p_NV).sum(-1)
    q_NV, log_zz_N = softmax(z_NV, t_NV)
    return cross_N - (log_zt_N - log_zz_N), q_NV.sub_(p_NV)


def reverse_kl(t_NV: Tensor, z_NV: Tensor, buffers: Buffers) -> tuple[Tensor, Tensor]:
    _, log_zt_N = softmax(t_NV, buffers("p"))
    q_NV, log_zz_N = softmax(z_NV, buffers("p"))
    d_NV = z_NV.sub_(t_NV)
    cross_N = torch.mul(q_NV, d_NV, out=t_NV).sum(-1)
    return cross_N + (log_zt_N - log_zz_N), d_NV.sub_(cross_N[:, None]).mul_(q_NV)


def jsd(t_NV: Tensor, z_NV: Tensor, buffers: Buffers) -> tuple[Tensor, Tensor]:
    p_NV, log_zt_N = softmax(t_NV, buffers("p"))
    q_NV, log_zz_N = softmax(z_NV, buffers("q"))
    l_NV = z_NV.sub_(t_NV).add_((log_zt_N - log_zz_N)[:, None])
    u_NV = torch.logaddexp(l_NV, l_NV.new_zeros(()), out=t_NV).neg_().add_(math.log(2))
    teacher_N = p_NV.mul_(u_NV).sum(-1)
    v_NV = l_NV.add_(u_NV)
    student_N = torch.mul(q_NV, v_NV, out=p_NV).sum(-1)
    return (teacher_N + student_N) / 2, v_NV.sub_(student_N[:, None]).mul_(q_NV).mul_(0.5)


DIVERGENCES: dict[str, Divergence] = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jsd}


def cross_entropy(z_NV: Tensor, target_N: Tensor, gradient_NV: Tensor) -> Tensor:
    """The cross entropy (N,) of ``target_N``; its gradient goes into ``gradient_NV``, and ``z_NV`` stays."""
    _, log_z_N = softmax(z_NV, gradient_NV)
    target_N1 = target_N[:, None]
    gradient_NV.scatter_add_(-1, target_N1, gradient_NV.new_full((), -1).expand(target_N1.shape))
    return log_z_N - z_NV.gather(-1, target_N1)[:, 0]


def softmax(logits_NV: Tensor, out_NV: Tensor) -> tuple[Tensor, Tensor]:
    """softmax in ``out_NV``, and log Σ exp (N,): the likeliest token's logit less the log of its probability.

    That probability is at least 1/V, so its log loses nothing.
    """
    torch.softmax(logits_NV, -1, out=out_NV)
    return out_NV, logits_NV.amax(-1) - out_NV.amax(-1).log()
