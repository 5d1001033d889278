"""What every mixer with a short convolution and heads is put together from."""

from itertools import accumulate

import torch
from torch import Tensor, nn

from distill.cache import MixerCacheLayer
from distill.ssd import causal_convolution, convolution_step


class ShortConvolution(nn.Conv1d):
    """The depthwise causal convolution, with the parameters' names and shapes of every Mamba implementation.

    Args:
        channels: C.
        width: taps, the current position's included.
        bias: add a number to every channel.
    """

    def __init__(self, channels: int, width: int, *, bias: bool = True) -> None:
        super().__init__(channels, channels, width, groups=channels, bias=bias)

    @torch.no_grad()
    def open_(self) -> None:
        """Let only the current position pass, unchanged."""
        self.weight.zero_()
        self.weight[:, 0, -1] = 1.0
        if self.bias is not None:
            self.bias.zero_()

    def forward(
        self,
        x_BTC: Tensor,
        *,
        valid_BT: Tensor | None = None,
        resets_BT: Tensor | None = None,
        cache: MixerCacheLayer | None = None,
    ) -> Tensor:
        """Convolve (B, T, C), continuing from the inputs a cache remembers and stopping at document borders."""
        n_past = self.kernel_size[0] - 1
        weight_CK = self.weight.squeeze(1).to(x_BTC.dtype)
        bias_C = None if self.bias is None else self.bias.to(x_BTC.dtype)
        if cache is not None and n_past and is_step(x_BTC, resets_BT, cache):
            return convolution_step(cache.slide_inputs(x_BTC, valid_BT), weight_CK, bias_C)
        past_BTC = None if cache is None else cache.exchange_inputs(x_BTC, n_past)
        return causal_convolution(x_BTC, weight_CK, bias_C, past_BTC=past_BTC, resets_BT=resets_BT)


def is_step(x_BT: Tensor, resets_BT: Tensor | None, cache: MixerCacheLayer | None) -> bool:
    """Whether this call is one token behind others, as almost all of generation is."""
    return x_BT.shape[1] == 1 and resets_BT is None and cache is not None and cache.has_past()


def consecutive(widths: dict[str, int]) -> dict[str, slice]:
    """Where each part lies when parts of these widths follow one another."""
    ends = list(accumulate(widths.values()))
    return {name: slice(end - width, end) for (name, width), end in zip(widths.items(), ends, strict=True)}


def split_heads(x_BTC: Tensor, n_heads: int) -> Tensor:
    return x_BTC.unflatten(-1, (n_heads, -1))


def mask_positions(x_BTC: Tensor, valid_BT: Tensor | None) -> Tensor:
    """Zero at padding."""
    return x_BTC if valid_BT is None else x_BTC * valid_BT[..., None].to(x_BTC.dtype)


def inverse_softplus(y: Tensor) -> Tensor:
    """x with softplus(x) = y, for y > 0."""
    return y + torch.log(-torch.expm1(-y))


def widen(x: Tensor) -> Tensor:
    """At least fp32: a decay near one raised to thousands of positions does not survive bf16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
