"""The scan by other libraries' GPU kernels: how their arguments map onto ours.

flash-linear-attention's *simple GLA* (a gate per head) is the same recurrence in the words of attention::

    S_t = exp(g_t) S_{t−1} + k_t ⊗ v_t      o_t = scale · q_tᵀ S_t

    q = C     k = B     v = x     g = log decay     scale = 1     S transposed: (N × P) there, (P × N) here

mamba-ssm's kernel is not here. It takes a step Δ and one A per head and forms both the decay exp(Δ A) and the input Δ x
from them. Our scan takes decay and input apart (MOHAWK's mixer has no step at all), and to reach it from there x would
have to be divided by Δ, which is infinite where nothing decays. Its inner kernels take them apart too, but they are
private and their backward pass would have to be put together anew.

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
