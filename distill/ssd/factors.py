"""What a mixing matrix is made of: T·(2 N + 2) numbers a head instead of T²."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class MatrixFactors:
    """The semiseparable matrix of a mixer, M_ts = (C_t · B_s) · a_{s+1} … a_t · step_s + D δ_ts for s ≤ t.

    Attributes:
        log_decay_BTH: logarithm of the decay a, ≤ 0.
        B_BTHN: what a position writes with.
        C_BTHN: what a position reads with.
        step_BTH: step size that scales what is written; None means 1.
        skip_H: weight D of the position's own value; None means 0.
    """

    log_decay_BTH: Tensor
    B_BTHN: Tensor
    C_BTHN: Tensor
    step_BTH: Tensor | None = None
    skip_H: Tensor | None = None

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """All of them, in the order above."""
        return self.log_decay_BTH, self.B_BTHN, self.C_BTHN, self.step_BTH, self.skip_H

    def of_heads(self, heads: Sequence[int]) -> "MatrixFactors":
        """The same of some heads alone, in their order."""
        at = list(heads)
        step_BTH, skip_H = self.step_BTH, self.skip_H
        return MatrixFactors(
            self.log_decay_BTH[:, :, at],
            self.B_BTHN[:, :, at],
            self.C_BTHN[:, :, at],
            None if step_BTH is None else step_BTH[:, :, at],
            None if skip_H is None else skip_H[at],
        )
