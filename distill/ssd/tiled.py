"""The chunked scan with its backward pass written out, a tile of heads and chunks at a time.

The mathematics is that of :mod:`distill.ssd.chunked`. What differs is what is kept and when: the Q×Q matrices of a
chunk live only while their tile is worked on, forward and backward alike, and between the two passes nothing is kept
but the arguments and the state at every chunk's border.

========  =================================================================================
symbol    meaning
========  =================================================================================
c, Q      chunks; positions in a chunk (t, s: the position that reads, the one that is read)
b         blocks of a tile: (sequence, head, chunk), in this order
R         the tile's pairs (sequence, head); a block's chunks follow one another
i, j      borders of a tile's c chunks, 0 .. c: before the first, between two, after the last
========  =================================================================================

With cumulative log decay k_t inside a chunk, and 1[·] false where a document begins in between::

    L_ts = 1[t ≥ s] exp(k_t − k_s)     decay inside the chunk
    α_t  = exp(k_t)                    what a position still has of the state at the chunk's start
    ω_s  = exp(k_Q − k_s)              what the state at the chunk's end still has of a position
    W_ij = Π decay of whole chunks     from border j to border i ≥ j

Forward, for S_j the state at border j (P × N), S_0 given::

    y    = (C Bᵀ ∘ L) x + α ∘ C S_jᵀ
    U_j  = (ω ∘ x)ᵀ B                  what chunk j writes
    S_i  = W_i0 S_0 + Σ_j W_i,j+1 U_j

Backward, d· being the loss's gradient with respect to ·, and S, S' the states at a chunk's start and end::

    dS_j = Σ_i W_ij V_i,               V_i = (α ∘ dy)ᵀ C of the chunk that starts at border i; after the last, dS given
    dx   = (C Bᵀ ∘ L)ᵀ dy + ω ∘ B dS'ᵀ
    dM   = dy xᵀ ∘ L
    dC   = dM  B + α ∘ dy S
    dB   = dMᵀ C + ω ∘ x dS'

The decay needs no matrix of its own. y is linear in C, so ⟨dC_t, C_t⟩ collects everything that multiplies exp(k_t);
⟨dB_s, B_s⟩ collects everything that multiplies exp(−k_s). The decay at t acts on what was there before it::

    d log_decay_t = ⟨dS, S⟩ − Σ_{s<t} (⟨dC_s, C_s⟩ − ⟨dB_s, B_s⟩)        s in the chunk of t

Every exponent is a difference ≤ 0: exp(k_t) exp(−k_s), which would save the Q×Q exponentials, overflows.
"""

import math
from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from distill.ssd.chunked import into_chunks

# Blocks a thread works on at once on CPU: a matrix of each is 1 MiB in all, which stays in cache, and calls are few
# enough that Python does not show (docs/experiments.md). Other devices take all sequences and heads at once.
_BLOCKS_A_THREAD = 64
# Chunks a tile reaches over: W is quadratic in them.
_SPAN = 16
_LOG2_E = math.log2(math.e)


class _Tile(NamedTuple):
    """Which sequences, chunks and heads; ``groups`` says whose B and C the heads read."""

    rows: slice
    chunks: slice
    heads: slice
    groups: slice | Tensor

    def blocks(self, sequence_BcQHW: Tensor, dtype: torch.dtype, heads: slice | Tensor | None = None) -> Tensor:
        """(b, Q, W), packed: products of matrices whose rows lie a power of two apart take up to twice as long."""
        heads = self.heads if heads is None else heads
        tile_BcQHW = sequence_BcQHW[self.rows, self.chunks][:, :, :, heads]
        return tile_BcQHW.permute(0, 3, 1, 2, 4).to(dtype, memory_format=torch.contiguous_format).flatten(0, 2)

    def put(self, blocks_bQW: Tensor, sequence_BcQHW: Tensor) -> None:
        """Write (b, Q, W) where :meth:`blocks` read it."""
        tile_BcQHW = sequence_BcQHW[self.rows, self.chunks, :, self.heads]
        n_rows, n_chunks, _, n_heads, _ = tile_BcQHW.shape
        tile_BcQHW.copy_(blocks_bQW.unflatten(0, (n_rows, n_heads, n_chunks)).permute(0, 2, 3, 1, 4))

    def add_to_groups(self, blocks_bQN: Tensor, sequence_BcQGN: Tensor) -> None:
        """Add (b, Q, N) of every head to its group's."""
        if isinstance(self.groups, slice):
            self.put(blocks_bQN, sequence_BcQGN)
        else:
            tile_BcQGN = sequence_BcQGN[self.rows, self.chunks]
            n_rows, n_chunks = tile_BcQGN.shape[:2]
            heads_BcQHN = blocks_bQN.unflatten(0, (n_rows, -1, n_chunks)).permute(0, 2, 3, 1, 4)
            tile_BcQGN.index_add_(3, self.groups, heads_BcQHN.to(tile_BcQGN.dtype))


class _Decays(NamedTuple):
    """L, α, ω and W of a tile."""

    within_bQQ: Tensor
    since_bQ1: Tensor
    remaining_bQ1: Tensor
    between_Rij: Tensor


def tiled_scan(
    log_decay_BTH: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    x_BTHP: Tensor,
    initial_state_BHPN: Tensor | None,
    resets_BT: Tensor | None,
    chunk: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Arguments and results of :func:`distill.ssd.scan`; sums in ``dtype``; differentiable once."""
    chunk = min(chunk, x_BTHP.shape[1])
    tensors = (log_decay_BTH, B_BTGN, C_BTGN, x_BTHP)
    differentiated = (*tensors, initial_state_BHPN)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in differentiated):
        return _TiledScan.apply(*differentiated, resets_BT, chunk, dtype)
    tiles = _tiles(x_BTHP, B_BTGN.shape[2], chunk)
    return _forward(*tensors, initial_state_BHPN, resets_BT, chunk, dtype, tiles, None)


class _TiledScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        log_decay_BTH: Tensor,
        B_BTGN: Tensor,
        C_BTGN: Tensor,
        x_BTHP: Tensor,
        initial_state_BHPN: Tensor | None,
        resets_BT: Tensor | None,
        chunk: int,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        starts: list[Tensor] = []
        ctx.chunk, ctx.dtype, ctx.tiles = chunk, dtype, _tiles(x_BTHP, B_BTGN.shape[2], chunk)
        ctx.initial_dtype = None if initial_state_BHPN is None else initial_state_BHPN.dtype
        tensors = (log_decay_BTH, B_BTGN, C_BTGN, x_BTHP)
        results = _forward(*tensors, initial_state_BHPN, resets_BT, chunk, dtype, ctx.tiles, starts)
        ctx.save_for_backward(*tensors, resets_BT, *starts)
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BTHP: Tensor, dfinal_BHPN: Tensor) -> tuple[Tensor | None, ...]:
        log_decay_BTH, B_BTGN, C_BTGN, x_BTHP, resets_BT, *starts = ctx.saved_tensors
        *gradients, dinitial_BHPN = _backward(
            log_decay_BTH,
            B_BTGN,
            C_BTGN,
            x_BTHP,
            resets_BT,
            dy_BTHP,
            dfinal_BHPN,
            ctx.chunk,
            ctx.dtype,
            ctx.tiles,
            starts,
        )
        dinitial = None if ctx.initial_dtype is None else dinitial_BHPN.to(ctx.initial_dtype)
        return *gradients, dinitial, None, None, None


def _forward(
    log_decay_BTH: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    x_BTHP: Tensor,
    initial_state_BHPN: Tensor | None,
    resets_BT: Tensor | None,
    chunk: int,
    dtype: torch.dtype,
    tiles: list[_Tile],
    starts: list[Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """y_BTHP and the final state; the states that a tile's chunks start from are appended to ``starts``."""
    log_decay_BcQH, B_BcQGN, C_BcQGN, x_BcQHP = (
        into_chunks(tensor, chunk) for tensor in (log_decay_BTH, B_BTGN, C_BTGN, x_BTHP)
    )
    resets_BcQ = None if resets_BT is None else into_chunks(resets_BT, chunk)
    n_rows, _, _, n_heads, P = x_BcQHP.shape
    y_BcQHP = torch.empty_like(x_BcQHP, memory_format=torch.contiguous_format)
    # The state at the border that the next tile starts from.
    state_BHPN = x_BTHP.new_zeros(n_rows, n_heads, P, B_BTGN.shape[-1], dtype=dtype)
    if initial_state_BHPN is not None:
        state_BHPN.copy_(initial_state_BHPN)

    with torch.autocast(x_BTHP.device.type, enabled=False):
        for tile in tiles:
            decays = _decays(tile, log_decay_BcQH, resets_BcQ, dtype)
            x_bQP = tile.blocks(x_BcQHP, dtype)
            B_bQN, C_bQN = (tile.blocks(tensor, dtype, tile.groups) for tensor in (B_BcQGN, C_BcQGN))

            border_BHPN = state_BHPN[tile.rows, tile.heads]
            W_Rij, first_R1S = decays.between_Rij, border_BHPN.flatten(2).flatten(0, 1).unsqueeze(1)
            written_RcS = _by_pair((x_bQP * decays.remaining_bQ1).mT @ B_bQN, first_R1S)
            start_RcS = _carry(W_Rij[:, :-1, :1], first_R1S, W_Rij[:, :-1, 1:], written_RcS)
            end_R1S = _carry(W_Rij[:, -1:, :1], first_R1S, W_Rij[:, -1:, 1:], written_RcS)
            start_bPN = start_RcS.view(-1, *state_BHPN.shape[2:])
            border_BHPN.copy_(end_R1S.view_as(border_BHPN))
            if starts is not None:
                starts.append(start_bPN)

            y_bQP = (C_bQN @ B_bQN.mT).mul_(decays.within_bQQ) @ x_bQP
            y_bQP.baddbmm_(C_bQN * decays.since_bQ1, start_bPN.mT)
            tile.put(y_bQP, y_BcQHP)
    return y_BcQHP.flatten(1, 2)[:, : x_BTHP.shape[1]], state_BHPN


def _backward(
    log_decay_BTH: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    x_BTHP: Tensor,
    resets_BT: Tensor | None,
    dy_BTHP: Tensor,
    dfinal_BHPN: Tensor,
    chunk: int,
    dtype: torch.dtype,
    tiles: list[_Tile],
    starts: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """Gradients of log decay, B, C, x and the initial state."""
    arguments = (log_decay_BTH, B_BTGN, C_BTGN, x_BTHP)
    log_decay_BcQH, B_BcQGN, C_BcQGN, x_BcQHP, dy_BcQHP = (
        into_chunks(tensor, chunk) for tensor in (*arguments, dy_BTHP)
    )
    resets_BcQ = None if resets_BT is None else into_chunks(resets_BT, chunk)
    dlog_decay_BcQH, dx_BcQHP = (
        torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (log_decay_BcQH, x_BcQHP)
    )
    shared = B_BTGN.shape[2] < x_BTHP.shape[2]
    # Heads that share a group are added up in the dtype of the sums.
    dB_BcQGN, dC_BcQGN = (
        torch.zeros_like(tensor, dtype=dtype) if shared else torch.empty_like(tensor) for tensor in (B_BcQGN, C_BcQGN)
    )
    dstate_BHPN = dfinal_BHPN.to(dtype, copy=True)  # of the border that the next tile ends at

    with torch.autocast(x_BTHP.device.type, enabled=False):
        for tile, start_bPN in zip(reversed(tiles), reversed(starts), strict=True):
            decays = _decays(tile, log_decay_BcQH, resets_BcQ, dtype)
            x_bQP, dy_bQP = (tile.blocks(tensor, dtype) for tensor in (x_BcQHP, dy_BcQHP))
            B_bQN, C_bQN = (tile.blocks(tensor, dtype, tile.groups) for tensor in (B_BcQGN, C_BcQGN))
            fading_bQP = dy_bQP * decays.since_bQ1

            border_BHPN = dstate_BHPN[tile.rows, tile.heads]
            W_Rji, last_R1S = decays.between_Rij.mT, border_BHPN.flatten(2).flatten(0, 1).unsqueeze(1)
            read_RcS = _by_pair(fading_bQP.mT @ C_bQN, last_R1S)
            dend_RcS = _carry(W_Rji[:, 1:, -1:], last_R1S, W_Rji[:, 1:, :-1], read_RcS)
            dfirst_R1S = _carry(W_Rji[:, :1, -1:], last_R1S, W_Rji[:, :1, :-1], read_RcS)
            del read_RcS
            dend_bPN = dend_RcS.view_as(start_bPN)
            border_BHPN.copy_(dfirst_R1S.view_as(border_BHPN))

            dM_bQQ = (dy_bQP @ x_bQP.mT).mul_(decays.within_bQQ)
            dC_bQN = (dM_bQQ @ B_bQN).baddbmm_(fading_bQP, start_bPN)
            del fading_bQP  # what is done with is let go: these matrices are the most that training a layer holds
            tile.add_to_groups(dC_bQN, dC_BcQGN)
            dB_bQN = (dM_bQQ.mT @ C_bQN).baddbmm_(x_bQP * decays.remaining_bQ1, dend_bPN)
            del dM_bQQ, x_bQP
            tile.add_to_groups(dB_bQN, dB_BcQGN)
            passing_bQ = dC_bQN.mul_(C_bQN).addcmul_(dB_bQN, B_bQN, value=-1).sum(-1)
            del dC_bQN, dB_bQN

            dx_bQP = (C_bQN @ B_bQN.mT).mul_(decays.within_bQQ).mT @ dy_bQP
            dx_bQP.baddbmm_(B_bQN * decays.remaining_bQ1, dend_bPN.mT)
            tile.put(dx_bQP, dx_BcQHP)
            del dx_bQP, dy_bQP, B_bQN, C_bQN

            start_RcS = start_bPN.view_as(dend_RcS)
            later_Rc = (dend_RcS[:, :-1] * start_RcS[:, 1:]).sum(-1)
            carried_Rc = torch.cat([(dfirst_R1S * start_RcS[:, :1]).sum(-1), later_Rc], dim=1)
            dlog_decay_bQ = carried_Rc.view(-1, 1) - F.pad(passing_bQ[:, :-1].cumsum(-1), (1, 0))
            tile.put(dlog_decay_bQ[..., None], dlog_decay_BcQH[..., None])

    if resets_BcQ is not None:  # nothing passes a reset; the difference of two equal sums is only nearly zero
        dlog_decay_BcQH.masked_fill_(resets_BcQ[..., None], 0)
    gradients = (dlog_decay_BcQH, dB_BcQGN, dC_BcQGN, dx_BcQHP)
    return *(
        gradient.flatten(1, 2)[:, : like.shape[1]].to(like.dtype)
        for gradient, like in zip(gradients, arguments, strict=True)
    ), dstate_BHPN


def _tiles(x_BTHP: Tensor, n_groups: int, chunk: int) -> list[_Tile]:
    """Tiles in the order in which the state passes through them."""
    n_rows, length, n_heads, _ = x_BTHP.shape
    n_chunks = -(-length // chunk)
    rows, heads = n_rows, n_heads
    if x_BTHP.device.type == "cpu":
        pairs = max(1, _BLOCKS_A_THREAD * torch.get_num_threads() // min(_SPAN, n_chunks))
        heads = min(n_heads, pairs)
        rows = min(n_rows, pairs // heads)
    tiles = []
    for row, head in product(range(0, n_rows, rows), range(0, n_heads, heads)):
        some = slice(head, min(head + heads, n_heads))
        groups: slice | Tensor = some
        if n_groups < n_heads:
            groups = torch.arange(some.start, some.stop, device=x_BTHP.device) // (n_heads // n_groups)
        for start in range(0, n_chunks, _SPAN):
            tiles.append(_Tile(slice(row, row + rows), slice(start, min(start + _SPAN, n_chunks)), some, groups))
    return tiles


def _decays(tile: _Tile, log_decay_BcQH: Tensor, resets_BcQ: Tensor | None, dtype: torch.dtype) -> _Decays:
    """Powers of two rather than of e, and cut off at 0 rather than masked with −∞: both halve the time on CPU."""
    cumulative_bQ = (tile.blocks(log_decay_BcQH[..., None], dtype).squeeze(-1) * _LOG2_E).cumsum(-1)
    n_chunks = tile.chunks.stop - tile.chunks.start
    within_bQQ = (cumulative_bQ[:, :, None] - cumulative_bQ[:, None, :]).clamp_(max=0).exp2_()
    since_bQ = cumulative_bQ.exp2()
    total_Rc = cumulative_bQ[:, -1].unflatten(0, (-1, n_chunks))
    border_Rj = F.pad(total_Rc.cumsum(-1), (1, 0))
    between_Rij = (border_Rj[:, :, None] - border_Rj[:, None, :]).clamp_(max=0).exp2_()
    if resets_BcQ is not None:
        n_heads = tile.heads.stop - tile.heads.start
        resets_bQ = resets_BcQ[tile.rows, None, tile.chunks].expand(-1, n_heads, -1, -1).flatten(0, 2)
        document_bQ = resets_bQ.cumsum(-1)
        within_bQQ *= document_bQ[:, :, None] == document_bQ[:, None, :]
        since_bQ *= document_bQ == 0
        document_Rj = F.pad(document_bQ[:, -1].unflatten(0, (-1, n_chunks)).cumsum(-1), (1, 0))
        between_Rij *= document_Rj[:, :, None] == document_Rj[:, None, :]
    within_bQQ.tril_()
    return _Decays(within_bQQ, since_bQ[..., None], within_bQQ[:, -1, :, None], between_Rij.tril_())


def _by_pair(blocks_bPN: Tensor, like_R1S: Tensor) -> Tensor:
    """(b, P, N) to (R, c, S) with the state in one dimension."""
    return blocks_bPN.view(like_R1S.shape[0], -1, like_R1S.shape[2])


def _carry(weight_Ri1: Tensor, given_R1S: Tensor, weight_Ric: Tensor, added_RcS: Tensor) -> Tensor:
    """States (R, i, S) from the one that is given and what every chunk adds."""
    return torch.baddbmm(weight_Ri1 * given_R1S, weight_Ric, added_RcS)
