"""One position of the scan, for generation: constant memory, the state updated in place."""

from torch import Tensor


def scan_step(log_decay_BH: Tensor, B_BGN: Tensor, C_BGN: Tensor, x_BHP: Tensor, state_BHPN: Tensor) -> Tensor:
    """Advance the state by one position and read it.

    Args:
        log_decay_BH: logarithm of this position's decay, ≤ 0.
        B_BGN: what the position writes with; G divides H, neighbouring heads share a group.
        C_BGN: what the position reads with.
        x_BHP: the position's input (step size folded in).
        state_BHPN: the state before the position; **overwritten** with the state after it.

    Returns:
        y_BHP in x's dtype. The state keeps its own dtype (fp32 as :func:`distill.ssd.scan` returns it).
    """
    dtype = state_BHPN.dtype
    repeats = x_BHP.shape[1] // B_BGN.shape[1]
    B_BHN, C_BHN = _for_heads(B_BGN.to(dtype), repeats), _for_heads(C_BGN.to(dtype), repeats)
    state_BHPN.mul_(log_decay_BH.to(dtype).exp()[..., None, None])
    state_BHPN.addcmul_(x_BHP.to(dtype)[..., None], B_BHN[..., None, :])
    # A product and a sum: on CPU a matmul with a single column is six times as slow (docs/experiments.md).
    return (state_BHPN * C_BHN[..., None, :]).sum(-1).to(x_BHP.dtype)


def _for_heads(groups_BGN: Tensor, repeats: int) -> Tensor:
    return groups_BGN if repeats == 1 else groups_BGN.repeat_interleave(repeats, dim=1)
