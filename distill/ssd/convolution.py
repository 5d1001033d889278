"""The short depthwise convolution in front of the scan: causal, and never across a document border."""

import torch
from torch import Tensor
from torch.nn import functional as F


def causal_convolution(
    x_BTC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor | None = None,
    *,
    past_BTC: Tensor | None = None,
    resets_BT: Tensor | None = None,
) -> Tensor:
    """y_t = bias + Σ_k weight_k · x_{t−K+1+k}, each channel on its own.

    A sum of K shifted products rather than ``nn.Conv1d``, which cannot stop at a document border. On CPU, forward and
    backward, the two are equally fast at training shapes (scripts/bench_convolution.py, docs/experiments.md).

    Args:
        x_BTC: inputs; zero at padding.
        weight_CK: taps of each channel, the last one multiplies the current position.
        bias_C: added to every position.
        past_BTC: the K − 1 inputs before the first position (from a cache); zeros if None.
        resets_BT: bool, True where a document begins; taps do not reach behind it.

    Returns:
        y_BTC.
    """
    taps, length = weight_CK.shape[1], x_BTC.shape[1]
    if past_BTC is None:
        padded_BTC = F.pad(x_BTC, (0, 0, taps - 1, 0))
    else:
        padded_BTC = torch.cat([past_BTC.to(x_BTC.dtype), x_BTC], dim=1)
    y_BTC = x_BTC * weight_CK[:, -1] if bias_C is None else torch.addcmul(bias_C, x_BTC, weight_CK[:, -1])
    for lag in range(1, taps):
        start = taps - 1 - lag
        earlier_BTC = padded_BTC[:, start : start + length]
        if resets_BT is not None:
            earlier_BTC = earlier_BTC * _same_document(resets_BT, lag)[..., None]
        y_BTC = torch.addcmul(y_BTC, earlier_BTC, weight_CK[:, -1 - lag])
    return y_BTC


def convolution_step(window_BKC: Tensor, weight_CK: Tensor, bias_C: Tensor | None = None) -> Tensor:
    """The last position of :func:`causal_convolution` alone, for generation.

    Args:
        window_BKC: its input, last, behind the K − 1 before it.
        weight_CK: taps of each channel, the last one multiplies the current position.
        bias_C: added to it.

    Returns:
        y_B1C.
    """
    inputs, taps = window_BKC.unbind(1), weight_CK.unbind(1)
    y_BC = inputs[-1] * taps[-1] if bias_C is None else torch.addcmul(bias_C, inputs[-1], taps[-1])
    for input_BC, tap_C in zip(inputs[-2::-1], taps[-2::-1], strict=True):
        y_BC = torch.addcmul(y_BC, input_BC, tap_C)
    return y_BC.unsqueeze(1)


def _same_document(resets_BT: Tensor, lag: int) -> Tensor:
    """True where positions t − lag and t belong together: no reset in (t − lag, t]."""
    document_BT = resets_BT.cumsum(-1)
    earlier_BT = F.pad(document_BT[:, :-lag], (lag, 0)) if lag < document_BT.shape[1] else torch.zeros_like(document_BT)
    return document_BT == earlier_BT
