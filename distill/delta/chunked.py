"""The gated delta rule in chunks: a triangular system inside a chunk, a recurrence between chunks.

Section 3.3 of Gated Delta Networks (arXiv 2412.06464), after the WY representation of "Parallelizing Linear
Transformers with the Delta Rule" (2406.06484). In a chunk that begins with the state S, with Γ_ts = α_{s+1} … α_t and
γ_t the product of all decays from the chunk's start up to t::

    A  = tril(diag(β) (Γ ∘ K Kᵀ), −1)
    U  = (I + A)⁻¹ diag(β) V                 what would be written if S were zero
    R  = (I + A)⁻¹ diag(β γ) K               what is taken back for each row of S that its keys find
    W  = U − R Sᵀ                            w_t of the chunk, (Q × P)
    Y  = (Γ ∘ Q Kᵀ) W + diag(γ) Q Sᵀ
    S' = γ_last S + Wᵀ diag(Γ_last) K

A reset makes γ zero behind it and Γ zero across it, and all six lines stay as they are. Layout (B, chunks, H, Q, ·).
"""

import functools

import torch
from torch import Tensor

from distill.ssd.chunked import CHUNK, into_chunks
from distill.ssd.reference import segment_decay


def delta_rule(
    log_decay_BTH: Tensor,
    beta_BTH: Tensor,
    k_BTHN: Tensor,
    q_BTHN: Tensor,
    v_BTHP: Tensor,
    *,
    initial_state_BHPN: Tensor | None = None,
    resets_BT: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Run S_t = α_t S_{t−1} (I − β_t k_t k_tᵀ) + β_t v_t k_tᵀ, y_t = S_t q_t over a sequence.

    Computes in fp32 (fp64 if any input is fp64) whatever the dtype of the inputs and whether or not autocast is on.

    Args:
        log_decay_BTH: logarithm of α, finite and ≤ 0; 0 keeps the state (padding).
        beta_BTH: β; 0 writes nothing (padding).
        k_BTHN: keys; where β is in [0, 1] and they have length 1, no state grows.
        q_BTHN: queries.
        v_BTHP: values.
        initial_state_BHPN: the state before the first position; zeros if None.
        resets_BT: bool, True where a document begins: what came before is forgotten there.
        chunk: positions handled at once; changes speed, not the result.

    Returns:
        y_BTHP in v's dtype and the final state_BHPN in the dtype of the sums.
    """
    inputs, out_dtype = (log_decay_BTH, beta_BTH, k_BTHN, q_BTHN, v_BTHP), v_BTHP.dtype
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in inputs), torch.float32)
    length, chunk = v_BTHP.shape[1], min(chunk, v_BTHP.shape[1])
    with torch.autocast(v_BTHP.device.type, enabled=False):
        # Padding at the end has log α = 0 and β = 0.
        log_decay_BcHQ, beta_BcHQ, k_BcHQN, q_BcHQN, v_BcHQP = (
            into_chunks(tensor.to(dtype), chunk).transpose(2, 3) for tensor in inputs
        )
        document_BcQ = None if resets_BT is None else into_chunks(resets_BT, chunk)
        decay_BcHQK = _within(log_decay_BcHQ, document_BcQ)
        since_start_BcHQ1 = _since_start(log_decay_BcHQ, document_BcQ)[..., None]

        beta_BcHQ1 = beta_BcHQ[..., None]
        coupled_BcHQK = (beta_BcHQ1 * decay_BcHQK * (k_BcHQN @ k_BcHQN.mT)).tril(-1)
        wanted_BcHQE = beta_BcHQ1 * torch.cat([v_BcHQP, since_start_BcHQ1 * k_BcHQN], dim=-1)
        identity_QQ = torch.eye(chunk, dtype=dtype, device=v_BTHP.device)
        solved_BcHQE = torch.linalg.solve_triangular(
            coupled_BcHQK + identity_QQ, wanted_BcHQE, upper=False, unitriangular=True
        )
        fresh_BcHQP, taken_BcHQN = solved_BcHQE.split([v_BcHQP.shape[-1], k_BcHQN.shape[-1]], dim=-1)

        starts_BcHPN, written_BcHQP, final_BHPN = _pass_states(
            fresh_BcHQP,
            taken_BcHQN,
            decay_BcHQK[..., -1, :, None] * k_BcHQN,
            since_start_BcHQ1[..., -1:, :],
            initial_state_BHPN,
        )
        read_BcHQK = decay_BcHQK * (q_BcHQN @ k_BcHQN.mT)
        y_BcHQP = read_BcHQK @ written_BcHQP + since_start_BcHQ1 * (q_BcHQN @ starts_BcHPN.mT)
    return y_BcHQP.transpose(2, 3).flatten(1, 2)[:, :length].to(out_dtype), final_BHPN


def _within(log_decay_BcHQ: Tensor, resets_BcQ: Tensor | None) -> Tensor:
    """Γ inside each chunk: the decay between two positions, zero across documents."""
    n_chunks = log_decay_BcHQ.shape[1]
    resets_ZQ = None if resets_BcQ is None else resets_BcQ.flatten(0, 1)
    return segment_decay(log_decay_BcHQ.flatten(0, 1), resets_ZQ).unflatten(0, (-1, n_chunks))


def _since_start(log_decay_BcHQ: Tensor, resets_BcQ: Tensor | None) -> Tensor:
    """γ: how much of the state before the chunk is left at each of its positions."""
    left_BcHQ = log_decay_BcHQ.cumsum(-1).exp()
    return left_BcHQ if resets_BcQ is None else left_BcHQ * (resets_BcQ.cumsum(-1) == 0)[:, :, None]


def _pass_states(
    fresh_BcHQP: Tensor, taken_BcHQN: Tensor, keys_BcHQN: Tensor, decay_BcH11: Tensor, initial_state_BHPN: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The state before each chunk, what each chunk writes, and the state after the last.

    ``unbind`` rather than indexing, as in :mod:`distill.ssd.chunked`.
    """
    if initial_state_BHPN is None:
        first_BHQP, first_BHQN = fresh_BcHQP[:, 0], taken_BcHQN[:, 0]
        state_BHPN = first_BHQP.new_zeros(*first_BHQP.shape[:2], first_BHQP.shape[-1], first_BHQN.shape[-1])
    else:
        state_BHPN = initial_state_BHPN.to(fresh_BcHQP.dtype)
    starts, written = [], []
    by_chunk = (tensor.unbind(1) for tensor in (fresh_BcHQP, taken_BcHQN, keys_BcHQN, decay_BcH11))
    for fresh_BHQP, taken_BHQN, keys_BHQN, decay_BH11 in zip(*by_chunk, strict=True):
        written_BHQP = fresh_BHQP - taken_BHQN @ state_BHPN.mT
        starts.append(state_BHPN)
        written.append(written_BHQP)
        state_BHPN = decay_BH11 * state_BHPN + written_BHQP.mT @ keys_BHQN
    return torch.stack(starts, dim=1), torch.stack(written, dim=1), state_BHPN
