"""The scan in chunks: quadratic inside a chunk, recurrent between chunks, everything a batched matmul.

The block decomposition of section 6 of "Transformers are SSMs" (arXiv 2405.21060). Layout is (B, chunks, G, R, Q, ·)
with R = H/G heads a group, so that B and C are broadcast over the heads that share them and never copied.

This is the form to read, and the one that ``torch.compile`` gets, which fuses it and derives its backward pass. Run
operation by operation, :mod:`distill.ssd.tiled` is faster and keeps far less.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 64  # 32 to 128 are equally fast on CPU, 256 is twice as slow (docs/experiments.md)


def chunked_scan(
    log_decay_BTH: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    x_BTHP: Tensor,
    initial_state_BHPN: Tensor | None,
    resets_BT: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """Arguments and results of :func:`distill.ssd.scan`, all in the dtype of the sums."""
    length, n_groups = x_BTHP.shape[1], B_BTGN.shape[2]
    chunk = min(chunk, length)
    # suffix c: chunks, Q (and K): positions in a chunk, R: heads of a group
    log_decay_BcGRQ = into_chunks(log_decay_BTH, chunk).unflatten(3, (n_groups, -1)).permute(0, 1, 3, 4, 2)
    x_BcGRQP = into_chunks(x_BTHP, chunk).unflatten(3, (n_groups, -1)).permute(0, 1, 3, 4, 2, 5)
    B_BcGQN = into_chunks(B_BTGN, chunk).transpose(2, 3)
    C_BcGQN = into_chunks(C_BTGN, chunk).transpose(2, 3)
    cumulative_BcGRQ = log_decay_BcGRQ.cumsum(-1)
    document_BcQ = None if resets_BT is None else into_chunks(resets_BT, chunk).cumsum(-1)

    # Inside a chunk: (C Bᵀ ∘ decay) x.
    decay_BcGRQK = _decay_within(cumulative_BcGRQ, document_BcQ)
    scores_BcGQK = C_BcGQN @ B_BcGQN.mT
    y_BcGRQP = (scores_BcGQK.unsqueeze(3) * decay_BcGRQK) @ x_BcGRQP

    # What each chunk adds to the state at its end: x is weighted by its remaining decay, the last row of the matrix.
    weighted_BcGRQP = x_BcGRQP * decay_BcGRQK[..., -1, :, None]
    added_BcGRPN = weighted_BcGRQP.mT @ B_BcGQN.unsqueeze(3)

    # Between chunks: the state each chunk starts from, decayed to each of its positions.
    since_start_BcGRQ = cumulative_BcGRQ.exp()
    if document_BcQ is not None:
        since_start_BcGRQ = since_start_BcGRQ * (document_BcQ == 0)[:, :, None, None]
    starts_BcGRPN, final_BGRPN = _pass_states(added_BcGRPN, since_start_BcGRQ[..., -1], initial_state_BHPN)
    y_BcGRQP = y_BcGRQP + (C_BcGQN.unsqueeze(3) @ starts_BcGRPN.mT) * since_start_BcGRQ[..., None]

    y_BTHP = y_BcGRQP.permute(0, 1, 4, 2, 3, 5).flatten(3, 4).flatten(1, 2)
    return y_BTHP[:, :length], final_BGRPN.flatten(1, 2)


def into_chunks(sequence_BT: Tensor, chunk: int) -> Tensor:
    """(B, T, …) to (B, c, Q, …). Zero padding at the end neither writes (x = 0) nor decays (log a = 0)."""
    missing = -sequence_BT.shape[1] % chunk
    if missing:
        sequence_BT = F.pad(sequence_BT, [0, 0] * (sequence_BT.ndim - 2) + [0, missing])
    return sequence_BT.unflatten(1, (-1, chunk))


def _decay_within(cumulative_BcGRQ: Tensor, document_BcQ: Tensor | None) -> Tensor:
    """a_{s+1} … a_t inside each chunk; masked before the exponential, like the reference's ``segment_decay``."""
    length = cumulative_BcGRQ.shape[-1]
    connected = torch.ones(length, length, dtype=torch.bool, device=cumulative_BcGRQ.device).tril()
    if document_BcQ is not None:
        same_BcQK = document_BcQ[..., :, None] == document_BcQ[..., None, :]
        connected = connected & same_BcQK[:, :, None, None]
    exponent_BcGRQK = cumulative_BcGRQ[..., :, None] - cumulative_BcGRQ[..., None, :]
    return exponent_BcGRQK.masked_fill(~connected, -torch.inf).exp()


def _pass_states(added_BcGRPN: Tensor, decay_BcGR: Tensor, initial_state_BHPN: Tensor | None) -> tuple[Tensor, Tensor]:
    """The state before each chunk, and after the last.

    ``unbind`` rather than indexing: indexing a chunk inside the loop makes backward write a full-size gradient
    per chunk, which is quadratic in the number of chunks.
    """
    if initial_state_BHPN is None:
        state_BGRPN = torch.zeros_like(added_BcGRPN[:, 0])
    else:
        state_BGRPN = initial_state_BHPN.unflatten(1, added_BcGRPN.shape[2:4])
    starts = []
    for added_BGRPN, decay_BGR in zip(added_BcGRPN.unbind(1), decay_BcGR.unbind(1), strict=True):
        starts.append(state_BGRPN)
        state_BGRPN = decay_BGR[..., None, None] * state_BGRPN + added_BGRPN
    return torch.stack(starts, dim=1), state_BGRPN
