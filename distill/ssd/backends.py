"""The scan as everybody calls it, and who runs it: one decision, which `distill doctor` asks as well."""

import functools
import importlib
import os
from importlib.util import find_spec

import torch
from torch import Tensor

from distill.errors import UserError
from distill.ssd.chunked import CHUNK, chunked_scan
from distill.ssd.kernels import fla_scan
from distill.ssd.tiled import tiled_scan

CHOICE = "DISTILL_SCAN"
"""The environment variable that names a backend; without it the first one that can run does."""

BACKENDS = {
    "fla": "flash-linear-attention's Triton kernels",
    "mamba_ssm": "mamba-ssm's Triton kernels, which serve mamba2 only",
    "torch": "chunked matmuls in plain PyTorch, on every device",
}
"""What may run the scan, in the order in which they are tried: fla before mamba_ssm, since it serves every mixer."""

_LIBRARIES = {
    "fla": ("fla.ops.simple_gla", "flash-linear-attention"),
    "mamba_ssm": ("mamba_ssm.ops.triton.ssd_combined", "mamba-ssm causal-conv1d --no-build-isolation"),
}
"""The module that has a backend's kernel, and what to install for it."""


def scan(
    log_decay_BTH: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    x_BTHP: Tensor,
    *,
    initial_state_BHPN: Tensor | None = None,
    resets_BT: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Run S_t = a_t S_{t−1} + x_t ⊗ B_t, y_t = S_t C_t over a sequence.

    Sums run in fp32 (fp64 if any input is fp64) whatever the dtype of the inputs and whether or not autocast is on.
    In plain PyTorch so do products; the kernels, on CUDA, multiply x, B and C in the dtype of B and C. Differentiable
    once.

    Args:
        log_decay_BTH: logarithm of the decay a_t, finite and ≤ 0; 0 keeps the state (padding).
        B_BTGN: what each position writes with; G divides H and neighbouring heads share a group.
        C_BTGN: what each position reads with.
        x_BTHP: inputs, step size folded in; zero at padding.
        initial_state_BHPN: the state before the first position; zeros if None.
        resets_BT: bool, True where a document begins: what came before is forgotten there.
        chunk: positions handled at once in plain PyTorch; changes speed, not the result.

    Returns:
        y_BTHP in x's dtype and the final state_BHPN in the dtype of the sums.

    Raises:
        UserError: if the backend that DISTILL_SCAN asks for cannot run this scan.
    """
    tensors = (log_decay_BTH, B_BTGN, C_BTGN, x_BTHP)
    if backend(x_BTHP.device, torch.promote_types(B_BTGN.dtype, C_BTGN.dtype)) == "fla":
        return fla_scan(*tensors, initial_state_BHPN, resets_BT)
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)
    if not torch.compiler.is_compiling():
        return tiled_scan(*tensors, initial_state_BHPN, resets_BT, chunk, dtype)
    with torch.autocast(x_BTHP.device.type, enabled=False):
        log_decay_BTH, B_BTGN, C_BTGN, wide_BTHP = (tensor.to(dtype) for tensor in tensors)
        start_BHPN = None if initial_state_BHPN is None else initial_state_BHPN.to(dtype)
        y_BTHP, state_BHPN = chunked_scan(log_decay_BTH, B_BTGN, C_BTGN, wide_BTHP, start_BHPN, resets_BT, chunk)
    return y_BTHP.to(x_BTHP.dtype), state_BHPN


def backend(device: torch.device, dtype: torch.dtype, *, stepped: bool = False) -> str:
    """Which of `BACKENDS` runs the scan of B and C of this dtype on this device.

    Args:
        stepped: the caller has the step Δ and the rate A that decay and input are made of, as ``mamba2`` has.

    Raises:
        UserError: if DISTILL_SCAN names none of them, or one that cannot.
    """
    asked = os.environ.get(CHOICE)
    if not asked:
        return next(name for name in BACKENDS if not obstacle(name, device, dtype, stepped=stepped))
    if asked not in BACKENDS:
        raise UserError(f"{CHOICE}={asked}: the scan runs by one of {', '.join(BACKENDS)}. Set one, or unset it.")
    if why := obstacle(asked, device, dtype, stepped=stepped):
        raise UserError(f"{CHOICE}={asked}: not here, {why}. Set {CHOICE}=torch, or unset it.")
    return asked


def obstacle(name: str, device: torch.device, dtype: torch.dtype, *, stepped: bool = False) -> str | None:
    """Why a backend cannot run the scan of B and C of this dtype on this device; None if it can.

    Args:
        stepped: as in :func:`backend`.
    """
    if name == "torch":
        return None
    if name == "mamba_ssm" and not stepped:
        return "it serves mamba2 only: it makes decay and input of a step Δ and a rate A"
    if name == "mamba_ssm" and torch.compiler.is_compiling():
        return "its kernels cannot be traced by torch.compile"
    if device.type != "cuda":
        return f"it needs a CUDA device, not the {device.type}"
    if dtype == torch.float64:
        return "it does not calculate in fp64"
    if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest":
        return 'it would round fp32 to TF32, which torch.set_float32_matmul_precision("high") allows'
    return _import_problem(*_LIBRARIES[name])


@functools.cache
def _import_problem(module: str, package: str) -> str | None:
    if find_spec(module.partition(".")[0]) is None:
        return f"it is not installed (pip install {package})"
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever Triton and CUDA raise where they do not fit together
        return f"it does not import ({type(error).__name__}: {error})"
    return _fla_problem() if module.startswith("fla.") else None


def _fla_problem() -> str | None:
    """fla's backward raises on Hopper where Triton computes it wrongly, unless tilelang does it instead.

    (fla-org/flash-linear-attention, fla/ops/common/chunk_o.py.) Found before a run begins, not in its first step.
    """
    known = importlib.import_module("fla.utils")
    wrong = (
        getattr(known, "IS_NVIDIA_HOPPER", False)
        and getattr(known, "TRITON_ABOVE_3_4_0", False)
        and not getattr(known, "TRITON_ABOVE_3_7_1", True)
    )
    if not wrong or find_spec("tilelang"):
        return None
    return "its gradients are wrong on Hopper by Triton 3.4.0 to 3.7.0 (newer Triton, or pip install tilelang)"
