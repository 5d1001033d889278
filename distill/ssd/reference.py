"""The recurrence and its mixing matrix as the paper writes them: what every fast path is tested against."""

import torch
from torch import Tensor


def scan_reference(
    log_decay_BTH: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    x_BTHP: Tensor,
    *,
    initial_state_BHPN: Tensor | None = None,
    resets_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence one position at a time, in the inputs' own dtype; otherwise as :func:`distill.ssd.scan`."""
    n_heads = x_BTHP.shape[2]
    B_BTHN, C_BTHN = expand_groups(B_BTGN, n_heads), expand_groups(C_BTGN, n_heads)
    decay_BTH = log_decay_BTH.exp()
    if resets_BT is not None:
        decay_BTH = decay_BTH * ~resets_BT[..., None]

    state_BHPN = initial_state_BHPN
    if state_BHPN is None:
        state_BHPN = x_BTHP.new_zeros(*x_BTHP[:, 0].shape, B_BTGN.shape[-1])
    outputs = []
    for t in range(x_BTHP.shape[1]):
        written_BHPN = x_BTHP[:, t, :, :, None] * B_BTHN[:, t, :, None, :]
        state_BHPN = decay_BTH[:, t, :, None, None] * state_BHPN + written_BHPN
        outputs.append((state_BHPN * C_BTHN[:, t, :, None, :]).sum(-1))
    return torch.stack(outputs, dim=1), state_BHPN


def mixing_matrix(log_decay_BTH: Tensor, B_BTGN: Tensor, C_BTGN: Tensor, *, resets_BT: Tensor | None = None) -> Tensor:
    """The T×T matrix M of ``y = M x`` (zero initial state), eq. 2 of "Transformers are SSMs" (arXiv 2405.21060).

    Args:
        log_decay_BTH: logarithm of the decay, ≤ 0.
        B_BTGN: what each position writes with.
        C_BTGN: what each position reads with.
        resets_BT: True where a document begins.

    Returns:
        M of shape (B, H, T, T), rows read, columns are read; zero above the diagonal and across documents.
    """
    n_heads = log_decay_BTH.shape[2]
    scores_BHTT = torch.einsum("bthn,bshn->bhts", expand_groups(C_BTGN, n_heads), expand_groups(B_BTGN, n_heads))
    return scores_BHTT * segment_decay(log_decay_BTH.transpose(1, 2), resets_BT)


def segment_decay(log_decay_BHT: Tensor, resets_BT: Tensor | None = None) -> Tensor:
    """Products of decays a_{s+1} … a_t as a (B, H, T, T) lower-triangular matrix; zero where a reset lies between.

    Differences of a cumulative sum, masked *before* the exponential: the upper triangle would overflow, and an
    infinite value there turns its zero gradient into NaN.
    """
    cumulative_BHT = log_decay_BHT.cumsum(-1)
    exponent_BHTT = cumulative_BHT[..., :, None] - cumulative_BHT[..., None, :]
    return exponent_BHTT.masked_fill(~reachable(log_decay_BHT, resets_BT), -torch.inf).exp()


def reachable(like_BHT: Tensor, resets_BT: Tensor | None) -> Tensor:
    """Which (t, s) pairs are connected: s ≤ t and no reset in (s, t]. Broadcasts against (B, H, T, T)."""
    length = like_BHT.shape[-1]
    causal_TT = torch.ones(length, length, dtype=torch.bool, device=like_BHT.device).tril()
    if resets_BT is None:
        return causal_TT
    document_BT = resets_BT.cumsum(-1)
    return causal_TT & (document_BT[:, None, :, None] == document_BT[:, None, None, :])


def expand_groups(groups_BTGN: Tensor, n_heads: int) -> Tensor:
    """Give each head its group's vector: head h reads group h // (H / G), so neighbours share (not tiled)."""
    n_groups = groups_BTGN.shape[2]
    assert n_heads % n_groups == 0, f"{n_heads} heads do not divide into {n_groups} groups"
    return groups_BTGN.repeat_interleave(n_heads // n_groups, dim=2)
