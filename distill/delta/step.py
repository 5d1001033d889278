"""One position of the gated delta rule, for generation: constant memory, the state updated in place."""

from torch import Tensor


def delta_step(
    log_decay_BH: Tensor, beta_BH: Tensor, k_BHN: Tensor, q_BHN: Tensor, v_BHP: Tensor, state_BHPN: Tensor
) -> Tensor:
    """Advance the state by one position and read it.

    Args:
        log_decay_BH: logarithm of α, ≤ 0.
        beta_BH: β.
        k_BHN: the position's key.
        q_BHN: its query.
        v_BHP: its value.
        state_BHPN: the state before the position; **overwritten** with the state after it.

    Returns:
        y_BHP in v's dtype. The state keeps its own dtype.
    """
    dtype = state_BHPN.dtype
    k_BH1N, q_BH1N = k_BHN.to(dtype)[..., None, :], q_BHN.to(dtype)[..., None, :]
    state_BHPN.mul_(log_decay_BH.to(dtype).exp()[..., None, None])
    # Products and sums: on CPU a matmul with a single column is slower (docs/experiments.md).
    written_BHP = beta_BH.to(dtype)[..., None] * (v_BHP.to(dtype) - (state_BHPN * k_BH1N).sum(-1))
    state_BHPN.addcmul_(written_BHP[..., None], k_BH1N)
    return (state_BHPN * q_BH1N).sum(-1).to(v_BHP.dtype)
