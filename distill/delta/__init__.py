"""The gated delta rule (Gated Delta Networks, arXiv 2412.06464): one recurrence, and the ways to run it.

========  =================================================================================
symbol    meaning
========  =================================================================================
B         batch
T, S      time: the position that reads, the position that is read
H         heads
P, N      channels of a value, of a key and a query
k, v, q   key (of length 1), value, query
α, β      how much of the state is kept, in (0, 1]; how much of what a key finds is exchanged, in [0, 1]
========  =================================================================================

Per head::

    S_t = α_t S_{t−1} (I − β_t k_t k_tᵀ) + β_t v_t k_tᵀ        (P × N)
    y_t = S_t q_t                                              (P)

Along k_t the state forgets what it held and takes v_t in; across it only α acts. Said by what is written::

    S_t = α_t S_{t−1} + w_t k_tᵀ                w_t = β_t (v_t − α_t S_{t−1} k_t)

The eigenvalues of I − β k kᵀ are 1 and 1 − β |k|², so with |k| = 1 and 0 ≤ β ≤ 1 no state grows but by what is written.
A *reset* at t sets S_{t−1} to zero first: a new document begins. The state lies as that of :mod:`distill.ssd` does.
"""

from distill.delta.chunked import delta_rule
from distill.delta.reference import delta_matrix, delta_rule_reference
from distill.delta.step import delta_step

__all__ = ["delta_matrix", "delta_rule", "delta_rule_reference", "delta_step"]
