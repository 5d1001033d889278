"""The output projection that comes nearest to a target, as ridge regression around the one it starts from.

========  =============================================================================
symbol    meaning
========  =============================================================================
y_n       what the heads make of token n, behind norm and gate (I numbers)
o_n       what the projection should make of it (D numbers)
W, W_0    the projection, (D, I), and the one that was seeded
λ         ``ridge``, relative to the mean square of y
========  =============================================================================

::

    minimise  Σ_n |W y_n − o_n|² + λ s |W − W_0|²              s = mean_i Σ_n y_ni²
    G = Σ y yᵀ,  R = Σ y oᵀ
    Wᵀ = (G + λ s I)⁻¹ (R + λ s W_0ᵀ)

With a bias, y has one more number, which is always 1, and W a column. A factor on a head's output is a factor on that
head's columns of W: scale head by head is part of what is found. Only G, R and Σ |o|² are kept, in fp64; the error of
any W follows from them.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class OutputSums:
    """G, R and Σ |o|² of one layer, as tokens come in.

    Args:
        with_bias: the projection has a bias.
    """

    def __init__(self, *, with_bias: bool) -> None:
        self.with_bias = with_bias
        self.heads_II: Tensor | None = None
        self.heads_ID: Tensor | None = None
        self.target = 0.0

    def add(self, heads_NI: Tensor, target_ND: Tensor) -> None:
        """Add tokens: heads (N, I) and target (N, D), of any dtype."""
        heads_NI, target_ND = heads_NI.double(), target_ND.double()
        if self.with_bias:
            heads_NI = F.pad(heads_NI, (0, 1), value=1.0)
        if self.heads_II is None or self.heads_ID is None:
            self.heads_II, self.heads_ID = heads_NI.mT @ heads_NI, heads_NI.mT @ target_ND
        else:
            self.heads_II.addmm_(heads_NI.mT, heads_NI)
            self.heads_ID.addmm_(heads_NI.mT, target_ND)
        self.target += float(target_ND.square().sum())

    def error(self, projection: nn.Linear) -> float:
        """Σ |W y − o|² / Σ |o|² of a projection: 0 is exact, 1 is what zeros would do."""
        assert self.heads_II is not None
        assert self.heads_ID is not None
        joint_ID = self._joint(projection)
        squares = (joint_ID * (self.heads_II @ joint_ID - 2 * self.heads_ID)).sum()
        return max(0.0, 1 + float(squares) / self.target) if self.target else 0.0

    @torch.no_grad()
    def fit_(self, projection: nn.Linear, ridge: float) -> None:
        """Put the minimum of the above into ``projection``, which holds W_0."""
        assert self.heads_II is not None
        assert self.heads_ID is not None
        inner = projection.in_features
        pull = ridge * self.heads_II.diagonal()[:inner].mean()
        pulled_II = self.heads_II + pull * torch.eye(len(self.heads_II), dtype=pull.dtype, device=pull.device)
        factor_II = torch.linalg.cholesky(pulled_II)
        joint_ID = torch.cholesky_solve(self.heads_ID + pull * self._joint(projection), factor_II)
        projection.weight.copy_(joint_ID[:inner].mT)
        if self.with_bias:
            projection.bias.copy_(joint_ID[inner])

    def _joint(self, projection: nn.Linear) -> Tensor:
        """Wᵀ, (I, D), in fp64; with a bias one row more."""
        weight_ID = projection.weight.detach().double().mT
        if not self.with_bias:
            return weight_ID
        return torch.cat([weight_ID, projection.bias.detach().double()[None]])
