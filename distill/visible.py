"""Which keys a query sees where no decoder says so: causal, its own document, no padding, a window if there is one."""

import torch
from torch import Tensor


def visible(
    hidden_BTD: Tensor,
    valid_BT: Tensor | None = None,
    resets_BT: Tensor | None = None,
    *,
    window: int | None = None,
) -> Tensor:
    """(B or 1, 1, T, T) bool. Padding sees itself alone, so that no row is empty.

    Args:
        hidden_BTD: what the queries and keys are made from.
        valid_BT: False at padding.
        resets_BT: True where a packed document begins.
        window: a token sees itself and the ``window - 1`` tokens before it; None means all.
    """
    length, device = hidden_BTD.shape[1], hidden_BTD.device
    seen_1TT = torch.ones(1, length, length, dtype=torch.bool, device=device).tril()
    if window is not None and window < length:
        seen_1TT = seen_1TT.triu(1 - window)
    if resets_BT is not None:
        document_BT = resets_BT.cumsum(-1)
        seen_1TT = seen_1TT & (document_BT[:, :, None] == document_BT[:, None, :])
    if valid_BT is not None:
        seen_1TT = (seen_1TT & valid_BT[:, None, :]) | torch.eye(length, dtype=torch.bool, device=device)
    return seen_1TT[:, None]
