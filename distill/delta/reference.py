"""The gated delta rule and its mixing matrix as written: what the fast path is tested against."""

import torch
from torch import Tensor

from distill.ssd.reference import segment_decay


def delta_rule_reference(
    log_decay_BTH: Tensor,
    beta_BTH: Tensor,
    k_BTHN: Tensor,
    q_BTHN: Tensor,
    v_BTHP: Tensor,
    *,
    initial_state_BHPN: Tensor | None = None,
    resets_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence position by position, in the inputs' dtype; otherwise as :func:`distill.delta.delta_rule`."""
    decay_BTH = log_decay_BTH.exp()
    if resets_BT is not None:
        decay_BTH = decay_BTH * ~resets_BT[..., None]
    state_BHPN = initial_state_BHPN
    if state_BHPN is None:
        state_BHPN = v_BTHP.new_zeros(*v_BTHP[:, 0].shape, k_BTHN.shape[-1])
    identity_NN = torch.eye(k_BTHN.shape[-1], dtype=k_BTHN.dtype, device=k_BTHN.device)
    outputs = []
    for t in range(v_BTHP.shape[1]):
        k_BHN, beta_BH11 = k_BTHN[:, t], beta_BTH[:, t, :, None, None]
        exchanged_BHNN = identity_NN - beta_BH11 * k_BHN[..., :, None] * k_BHN[..., None, :]
        written_BHPN = beta_BH11 * v_BTHP[:, t, :, :, None] * k_BHN[..., None, :]
        state_BHPN = decay_BTH[:, t, :, None, None] * state_BHPN @ exchanged_BHNN + written_BHPN
        outputs.append((state_BHPN * q_BTHN[:, t, :, None, :]).sum(-1))
    return torch.stack(outputs, dim=1), state_BHPN


def delta_matrix(
    log_decay_BTH: Tensor, beta_BTH: Tensor, k_BTHN: Tensor, q_BTHN: Tensor, *, resets_BT: Tensor | None = None
) -> Tensor:
    """The T×T matrix M of ``y = M v`` (zero initial state), rows read, columns are read; (B, H, T, T).

    With Γ_ts = α_{s+1} … α_t, zero across documents and above the diagonal, what is written solves a triangle::

        w_t = β_t (v_t − Σ_{s<t} Γ_ts (k_t · k_s) w_s)
        M   = (Γ ∘ Q Kᵀ) (I + tril(diag(β) (Γ ∘ K Kᵀ), −1))⁻¹ diag(β)

    The inverse couples all positions between s and t, so M is no product C_t · B_s times a decay: it has no
    ``distill.ssd.factors``.
    """
    k_BHTN, q_BHTN, beta_BHT1 = k_BTHN.transpose(1, 2), q_BTHN.transpose(1, 2), beta_BTH.mT[..., None]
    decay_BHTT = segment_decay(log_decay_BTH.mT, resets_BT)
    coupled_BHTT = (beta_BHT1 * decay_BHTT * (k_BHTN @ k_BHTN.mT)).tril(-1)
    identity_TT = torch.eye(k_BHTN.shape[2], dtype=k_BTHN.dtype, device=k_BTHN.device)
    read_BHTT = decay_BHTT * (q_BHTN @ k_BHTN.mT)
    # X (I + A) = M without the β of the columns.
    solved_BHTT = torch.linalg.solve_triangular(
        coupled_BHTT + identity_TT, read_BHTT, upper=False, left=False, unitriangular=True
    )
    return solved_BHTT * beta_BHT1.mT
