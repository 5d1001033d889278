"""The scan by other libraries' GPU kernels: how their arguments map onto ours.

flash-linear-attention's *simple GLA* (a gate per head) is the same recurrence in the words of attention::

    S_t = exp(g_t) S_{t−1} + k_t ⊗ v_t      o_t = scale · q_tᵀ S_t

    q = C     k = B     v = x     g = log decay     scale = 1     S transposed: (N × P) there, (P × N) here

mamba-ssm's *chunk scan* is Mamba-2 in its own words: a step Δ and one rate A < 0 per head make both decay and input::

    S_t = exp(Δ_t A) S_{t−1} + Δ_t x_t ⊗ B_t      y_t = S_t C_t

    dt = Δ     A, B, C, x as here     S (P × N), as here     seq_idx = number of the document, from 0

It serves the mixer that has Δ and A, which is ``mamba2``. MOHAWK's has no step at all, and to reach Δ x from decay and
input x would have to be divided by Δ, which is infinite where nothing decays.

Documents. The kernel gives the initial state to document 0 alone, in outputs and in gradients, and the final state is
that of the last position's document. So positions are numbered by the borders behind them: document 0 is what continues
the initial state, and where the first position is a border there is no document 0. D and z stay out: the skip and the
gate are modules of their own, which adapters and quantisation may replace.

Libraries are imported when a wrapper is called: this module imports on every machine.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from distill.ssd.reference import expand_groups

FORGET = -104.0
"""A log decay that leaves nothing: exp(−104) is zero in fp32, whose smallest number is exp(−103.3).

No lower than it must be. Kernels add log decays up inside a chunk, and behind a reset these sums are rounded to the
resolution of fp32 at their size: 8e-6 at 104, a hundred times more at 10⁴, which would shift every decay behind it.
"""

MAMBA_SSM_CHUNK = 256
"""Positions that mamba-ssm's kernels handle at once: the chunk of the library's own layer."""


def fla_scan(
    log_decay_BTH: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    x_BTHP: Tensor,
    initial_state_BHPN: Tensor | None,
    resets_BT: Tensor | None,
    kernel: Callable[..., Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Arguments and results of :func:`distill.ssd.scan`; the final state is fp32.

    Args:
        kernel: a function of the signature of ``chunk_simple_gla``, which is the default. The library's own naive
            versions have it too and run on CPU.
    """
    if kernel is None:
        kernel = importlib.import_module("fla.ops.simple_gla").chunk_simple_gla
    n_heads = x_BTHP.shape[2]
    dtype = torch.promote_types(B_BTGN.dtype, C_BTGN.dtype)
    log_decay_BTH = log_decay_BTH.float()
    if resets_BT is not None:
        log_decay_BTH = log_decay_BTH.masked_fill(resets_BT[..., None], FORGET)
    y_BTHP, state_BHNP = kernel(
        q=expand_groups(C_BTGN, n_heads).to(dtype),
        k=expand_groups(B_BTGN, n_heads).to(dtype),
        v=x_BTHP.to(dtype),
        g=log_decay_BTH,
        scale=1.0,
        initial_state=None if initial_state_BHPN is None else initial_state_BHPN.float().mT.contiguous(),
        output_final_state=True,
    )
    return y_BTHP.to(x_BTHP.dtype), state_BHNP.mT


def mamba_ssm_scan(
    step_BTH: Tensor,
    rate_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    x_BTHP: Tensor,
    initial_state_BHPN: Tensor | None,
    resets_BT: Tensor | None,
    kernel: Callable[..., Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`distill.ssd.scan` of the decay Δ A and the input Δ x; the final state is fp32.

    Products are of the dtype of B and C; Δ, A and the initial state are read in fp32.

    Args:
        step_BTH: Δ ≥ 0; 0 keeps the state (padding).
        rate_H: A < 0.
        x_BTHP: inputs, the step size not folded in.
        kernel: a function of the signature of ``mamba_chunk_scan_combined``, which is the default.
    """
    if kernel is None:
        kernel = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    dtype = torch.promote_types(B_BTGN.dtype, C_BTGN.dtype)
    y_BTHP, state_BHPN = kernel(
        x_BTHP.to(dtype),
        _at_least_fp32(step_BTH),
        _at_least_fp32(rate_H),
        B_BTGN.to(dtype),
        C_BTGN.to(dtype),
        MAMBA_SSM_CHUNK,
        initial_states=None if initial_state_BHPN is None else _at_least_fp32(initial_state_BHPN),
        seq_idx=None if resets_BT is None else resets_BT.cumsum(-1, dtype=torch.int32),
        return_final_states=True,
    )
    return y_BTHP.to(x_BTHP.dtype), state_BHPN


def _at_least_fp32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
