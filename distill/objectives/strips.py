"""Teacher's and student's mixing matrices a strip of rows at a time, compared, and the comparison's gradient.

========  =============================================================================
symbol    meaning
========  =============================================================================
K, G      key heads, and the query heads that share each of them; H = K·G
Z, Y      batch × key heads that are looked at together; the same times G
D, N      width of an attention head; state size of the mixer
R         rows of a strip, t0 ≤ t < t1
X         its columns, first ≤ s < t1, of which the last R are *inside* and the others *before*
ℓ         cumulative log decay: a_{s+1} … a_t = exp(ℓ_t − ℓ_s)
b_s       step_s B_s, what is written
E         M − A, the error
========  =============================================================================

::

    E_ts = (C_t · b_s) exp(ℓ_t − ℓ_s) + D δ_ts − A_ts                  A = softmax(mask(cap(scaling · Q Kᵀ)))

A strip holds whole rows, so its softmax is final, and so is the norm of each row. *Before* the strip the decay comes
apart at ℓ* = ℓ_{t0}: exp(ℓ_t − ℓ*) and exp(ℓ* − ℓ_s) are both ≤ 1, so reads and writes may be scaled with them, and
one product makes the part's errors without an exponential a pair. *Inside*, the R×R decays are written out, masked
before the exponential. The diagonal, which no decay touches, is kept apart as a vector: in ∂ℓ below it would be added
and taken off again, and with a short memory nothing else would be left of the digits.

The gradient of ½ Σ_t w_t ‖E_t‖², with the weights w_t held constant::

    ∂C_t = Σ_s w_t E_ts exp(ℓ_t − ℓ_s) b_s             ∂b_s = Σ_t w_t E_ts exp(ℓ_t − ℓ_s) C_t
    ∂ℓ_t = C_t · ∂C_t − b_t · ∂b_t                     ∂log a_r = Σ_{t≥r} ∂ℓ_t
    ∂B_s = step_s ∂b_s      ∂step_s = B_s · ∂b_s       ∂D = Σ_t w_t E_tt

Memory: two strips, copies of the factors and their gradients. ℓ is summed and subtracted in fp64, T numbers a head, so
that no error grows with T; all else is fp32 (fp64 for fp64 inputs).

Strips are as many heads as `_STRIP_BYTES` allows: on a CPU about what its cache holds, on a GPU enough for a launch to
be worth it. A fused GPU kernel would take the place of `sweep`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from distill.objectives.matrix_pair import Pair, Target, dot, pair_of, working_dtype
from distill.ssd.factors import MatrixFactors

_STRIP_BYTES = {"cpu": 2**22, "cuda": 2**27}
"""Of one strip, all its heads; at least one key head's query heads are looked at together."""
ROWS = {"cpu": 128, "cuda": 512}
"""Rows of a strip. More of them waste more above the diagonal, fewer scale the factors more often."""


def _on(table: dict[str, int], device: str) -> int:
    """Whatever is no CPU is taken for a GPU."""
    return table["cpu" if device == "cpu" else "cuda"]


class Gradients(NamedTuple):
    """Of ½ Σ_t w_t ‖E_t‖² with respect to the factors, a head apart: that of D is not yet summed over the batch."""

    log_decay_BTH: Tensor
    B_BTHN: Tensor
    C_BTHN: Tensor
    step_BTH: Tensor
    skip_BH: Tensor


def sweep(student: MatrixFactors, target: Target, *, by_row: bool, wanted: bool) -> tuple[Tensor, Gradients | None]:
    """Compare all rows of all heads.

    Args:
        by_row: return the rows' relative errors, and weigh their gradients accordingly.
        wanted: form the gradients.

    Returns:
        rows_BHT: ‖E_t‖², w_t = 1; with ``by_row`` ‖E_t‖ / a_t, a_t = max(‖A_t‖, T^-½), and w_t = 1 / (‖E_t‖ a_t).
            0 at invalid rows.
        gradients: in the same precision, or None.
    """
    B, H, T, _ = target.q_BHTD.shape
    like = target.q_BHTD.new_empty(0, dtype=working_dtype(student, target))
    rows_BHT = like.new_empty(B, H, T)
    gradients = None
    if wanted:
        of_scalars, of_vectors = (B, T, H), student.B_BTHN.shape
        gradients = Gradients(*map(like.new_empty, (of_scalars, of_vectors, of_vectors, of_scalars, (B, H))))
    n_rows = min(T, _on(ROWS, like.device.type))
    for batch, keys in _groups(target, n_rows * T * like.element_size()):
        pair = pair_of(student, target, batch, keys, like.dtype)
        found = _Found.empty(pair, wanted)
        room = like.new_empty(2, len(pair.own_YT) * n_rows * T)
        for t0 in range(0, T, n_rows):
            first = 0 if pair.starts is None else min(starts[t0] for starts in pair.starts)
            _compare(pair, _Strip(t0, min(t0 + n_rows, T), first, room), found, by_row)
        heads = target.heads(keys)
        rows_BHT[batch, heads] = found.rows_YT.view_as(rows_BHT[batch, heads])
        if gradients is not None:
            _store(gradients, pair, found, batch, heads)
    return rows_BHT, gradients


def working_bytes(heads: int, width: int, state_dim: int, length: int, device: str) -> int:
    """What a sweep takes besides its results while it looks at some of the heads, in fp32.

    Args:
        heads: of all sequences together.
        width: D.
        device: cpu or cuda.
    """
    strip = 4 * min(length, _on(ROWS, device)) * length
    together = max(1, min(heads, _on(_STRIP_BYTES, device) // strip))
    # Queries and keys; B, C, their gradients, what is written and its gradient as one strip sees them.
    return together * (2 * strip + 4 * length * (2 * width + 6 * state_dim))


def inverse(x: Tensor) -> Tensor:
    """1/x, and 0 where x is 0."""
    return torch.where(x == 0, 0, 1 / x)


def _groups(target: Target, strip_bytes: int) -> Iterator[tuple[slice, slice]]:
    """(sequences, key heads) to look at together: whole sequences where several fit, else key heads of one.

    Args:
        strip_bytes: of one query head.
    """
    B, K = target.k_BKTD.shape[:2]
    fitting = max(1, _on(_STRIP_BYTES, target.q_BHTD.device.type) // (strip_bytes * target.shared))
    n_keys, n_sequences = min(K, fitting), max(1, fitting // K)
    for b in range(0, B, n_sequences):
        for k in range(0, K, n_keys):
            yield slice(b, min(b + n_sequences, B)), slice(k, min(k + n_keys, K))


@dataclass(frozen=True)
class _Found:
    """What the strips of some heads leave behind: what `sweep` returns of a row, and gradients without the diagonal.

    Attributes:
        own_YT: w_t E_tt, the diagonal that ``C_YTN`` and ``b_YTN`` leave out.
    """

    rows_YT: Tensor
    own_YT: Tensor
    C_YTN: Tensor
    b_YTN: Tensor
    wanted: bool

    @staticmethod
    def empty(pair: Pair, wanted: bool) -> "_Found":
        """Every place is written by its own strip before others add to it."""
        like_matrix = pair.B_YTN if wanted else pair.B_YTN[:, :0]
        rows_YT, own_YT = torch.empty_like(pair.own_YT), torch.empty_like(pair.own_YT)
        return _Found(rows_YT, own_YT, torch.empty_like(like_matrix), torch.empty_like(like_matrix), wanted)


class _Strip(NamedTuple):
    """The columns first ≤ s < t1 of the rows t0 ≤ t < t1, and the room for two matrices of its size."""

    t0: int
    t1: int
    first: int
    room: Tensor

    @property
    def here(self) -> slice:
        return slice(self.t0, self.t1)

    @property
    def before(self) -> slice:
        return slice(self.first, self.t0)

    def split(self, x_YRX: Tensor) -> tuple[Tensor, Tensor]:
        """(before, inside)"""
        return x_YRX[..., : self.t0 - self.first], x_YRX[..., self.t0 - self.first :]


class _Factors(NamedTuple):
    """The student's side of a strip: reads and writes inside, and before with the decay from and to ℓ*."""

    C_YRN: Tensor
    b_YRN: Tensor
    decay_YRR: Tensor
    C_far_YRN: Tensor
    b_far_YXN: Tensor
    reading_YR1: Tensor
    writing_YX1: Tensor


def _compare(pair: Pair, strip: _Strip, found: _Found, by_row: bool) -> None:
    """Write the strip's rows of what is found, and add what they contribute to the columns before."""
    A_YRX = _attention(pair, strip)
    factors = _factors(pair, strip)
    if by_row:
        size_YR = torch.linalg.vector_norm(A_YRX, dim=-1).clamp_min(pair.own_YT.shape[-1] ** -0.5)
    E_YRX, own_YR = _subtract_from_student(A_YRX, pair, strip, factors)
    row_YR = torch.linalg.vector_norm(E_YRX, dim=-1).square() + own_YR.square()
    if by_row:
        error_YR = row_YR.sqrt()
        row_YR = error_YR / size_YR
        if found.wanted:
            weight_YR = inverse(error_YR * size_YR)
            E_YRX.mul_(weight_YR[..., None])
            own_YR *= weight_YR
    found.rows_YT[:, strip.here], found.own_YT[:, strip.here] = row_YR, own_YR
    if found.wanted:
        _add_gradients(E_YRX, found, strip, factors)


def _attention(pair: Pair, strip: _Strip) -> Tensor:
    """A of a strip, 0 at padding; (Y, R, X)."""
    Z, G, _, _ = pair.q_ZGTD.shape
    t0, t1, first, room = strip
    shape_ZGRX = (Z, G, t1 - t0, t1 - first)
    scores_ZGRX, A_ZGRX = (x[: Z * G * (t1 - t0) * (t1 - first)].view(shape_ZGRX) for x in room)
    # The query heads of a key head are rows of one product, so that keys are never repeated.
    q_ZRD, scores_ZRX = pair.q_ZGTD[:, :, t0:t1].flatten(1, 2), scores_ZGRX.flatten(1, 2)
    torch.bmm(q_ZRD, pair.k_ZTD[:, first:t1].mT, out=scores_ZRX)
    if pair.softcap is not None:
        scores_ZRX.div_(pair.softcap).tanh_().mul_(pair.softcap)
    row_R1 = torch.arange(t0, t1, device=room.device)[:, None]
    column_X = torch.arange(first, t1, device=room.device)
    scores_ZGRX[..., t0 - first :].masked_fill_(column_X[t0 - first :] > row_R1, -torch.inf)
    if pair.window is not None and t1 - pair.window > first:
        passed = slice(0, t1 - pair.window - first)
        scores_ZGRX[..., passed].masked_fill_(column_X[passed] <= row_R1 - pair.window, -torch.inf)
    elsewhere_Z1RX = _elsewhere(pair, strip)
    if elsewhere_Z1RX is not None:
        scores_ZGRX.masked_fill_(elsewhere_Z1RX, -torch.inf)
    # A token always sees itself, so no row is all -inf.
    torch.softmax(scores_ZGRX, dim=-1, out=A_ZGRX)
    if pair.valid_ZT is not None:
        A_ZGRX.masked_fill_(~(pair.valid_ZT[:, None, t0:t1, None] & pair.valid_ZT[:, None, None, first:t1]), 0)
    return A_ZGRX.flatten(0, 1)


def _elsewhere(pair: Pair, strip: _Strip) -> Tensor | None:
    """Where a column stands before the beginning of a row's document, (Z, 1, R, X); None where none does."""
    if pair.starts is None or all(starts[strip.t1 - 1] <= strip.first for starts in pair.starts):
        return None
    column_X = torch.arange(strip.first, strip.t1, device=strip.room.device)
    assert pair.start_ZT is not None
    return column_X < pair.start_ZT[:, None, strip.here, None]


def _factors(pair: Pair, strip: _Strip) -> _Factors:
    here, before = strip.here, strip.before
    dtype, R = pair.B_YTN.dtype, strip.t1 - strip.t0
    l_YR, border_Y1 = pair.l_YT[:, here], pair.l_YT[:, strip.t0, None]
    reading_YR1 = (l_YR - border_Y1).to(dtype).exp_()[..., None]
    writing_YX1 = (border_Y1 - pair.l_YT[:, before]).to(dtype).exp_()[..., None]
    not_below_RR = torch.ones(R, R, dtype=torch.bool, device=pair.B_YTN.device).triu()
    exponent_YRR = (l_YR[..., :, None] - l_YR[..., None, :]).to(dtype)
    return _Factors(
        C_YRN=pair.C_YTN[:, here],
        b_YRN=pair.B_YTN[:, here] * pair.step_YT1[:, here],
        decay_YRR=exponent_YRR.masked_fill_(not_below_RR, -torch.inf).exp_(),
        C_far_YRN=pair.C_YTN[:, here] * reading_YR1,
        b_far_YXN=pair.B_YTN[:, before] * (writing_YX1 * pair.step_YT1[:, before]),
        reading_YR1=reading_YR1,
        writing_YX1=writing_YX1,
    )


def _subtract_from_student(A_YRX: Tensor, pair: Pair, strip: _Strip, factors: _Factors) -> tuple[Tensor, Tensor]:
    """(E off the diagonal, in the place of A, and 0 on it; E's diagonal)."""
    before_YRX, inside_YRR = strip.split(A_YRX)
    torch.baddbmm(before_YRX, factors.C_far_YRN, factors.b_far_YXN.mT, beta=-1, out=before_YRX)
    diagonal_YR = inside_YRR.diagonal(dim1=-2, dim2=-1)
    own_YR = pair.own_YT[:, strip.here] - diagonal_YR
    diagonal_YR.zero_()
    M_YRR = torch.bmm(factors.C_YRN, factors.b_YRN.mT).mul_(factors.decay_YRR)
    torch.sub(M_YRR, inside_YRR, out=inside_YRR)
    elsewhere_Z1RX = _elsewhere(pair, strip)
    if elsewhere_Z1RX is not None:
        # A is 0 there and M is not, as the factors know nothing of documents.
        A_YRX.unflatten(0, (len(elsewhere_Z1RX), -1)).masked_fill_(elsewhere_Z1RX, 0)
    return A_YRX, own_YR


def _add_gradients(E_YRX: Tensor, found: _Found, strip: _Strip, factors: _Factors) -> None:
    """With respect to C and b, from weighted errors whose diagonal is 0."""
    before_YRX, inside_YRR = strip.split(E_YRX)
    inside_YRR.mul_(factors.decay_YRR)
    found.C_YTN[:, strip.here] = torch.bmm(inside_YRR, factors.b_YRN)
    found.b_YTN[:, strip.here] = torch.bmm(inside_YRR.mT, factors.C_YRN)
    found.C_YTN[:, strip.here] += torch.bmm(before_YRX, factors.b_far_YXN).mul_(factors.reading_YR1)
    found.b_YTN[:, strip.before].addcmul_(torch.bmm(before_YRX.mT, factors.C_far_YRN), factors.writing_YX1)


def _store(gradients: Gradients, pair: Pair, found: _Found, batch: slice, heads: slice) -> None:
    """From the gradients of C and b without the diagonal to those of all factors, in their own layout."""
    step_YT, own_YT = pair.step_YT1.squeeze(-1), found.own_YT
    read_YT, written_YT = dot(pair.C_YTN, found.C_YTN), dot(pair.B_YTN, found.b_YTN)
    through_YT = (read_YT - step_YT * written_YT).double()
    found.C_YTN.addcmul_(pair.B_YTN, (own_YT * step_YT)[..., None])
    found.b_YTN.addcmul_(pair.C_YTN, own_YT[..., None])
    written_YT += own_YT * dot(pair.B_YTN, pair.C_YTN)
    by_head = (through_YT.flip(-1).cumsum(-1).flip(-1), found.b_YTN.mul_(pair.step_YT1), found.C_YTN, written_YT)
    for gradient, x_YT in zip(gradients, by_head, strict=False):
        place = gradient[batch, :, heads]
        place.copy_(x_YT.unflatten(0, (place.shape[0], place.shape[2])).transpose(1, 2))
    gradients.skip_BH[batch, heads] = own_YT.sum(-1).view_as(gradients.skip_BH[batch, heads])
