"""The selective state-space scan ("SSD", Mamba-2, arXiv 2405.21060): one recurrence, and the ways to run it.

========  =================================================================================
symbol    meaning
========  =================================================================================
B         batch (as a suffix); the input map of the state space (as a name)
T, S      time: the position that reads, the position that is read
H         heads
G         groups; heads h·H/G .. (h+1)·H/G − 1 share B and C of group h
P         channels of a head's input x
N         state size: columns of a head's state
========  =================================================================================

Per head, with decay a_t = exp(log_decay_t) in (0, 1]::

    S_t = a_t · S_{t−1} + x_t ⊗ B_t          (P × N)
    y_t = S_t C_t                            (P)

A *reset* at t sets S_{t−1} to zero first: a new document begins. Written out over time this is ``y = M x``
with the mixing matrix ``M_ts = (C_t · B_s) · a_{s+1} … a_t`` for s ≤ t in the same document.

The step size of Mamba-2 is not an argument: callers fold it into ``x`` and ``log_decay``. One library's kernel wants it
apart (:func:`distill.ssd.kernels.mamba_ssm_scan`), and is called by who has it.
"""

from distill.ssd.backends import scan
from distill.ssd.convolution import causal_convolution, convolution_step
from distill.ssd.reference import mixing_matrix, scan_reference
from distill.ssd.step import scan_step

__all__ = ["causal_convolution", "convolution_step", "mixing_matrix", "scan", "scan_reference", "scan_step"]
