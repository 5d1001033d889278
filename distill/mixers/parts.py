"""What every mixer with a short convolution and heads is put together from."""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.cache import MixerCacheLayer
from distill.ssd import causal_convolution, convolution_step


class GatedHeadNorm(nn.Module):
    """w ∘ RMS_head(y ∘ SiLU(z)): the root mean square is taken over each head's channels alone, in fp32.

    Args:
        inner: H·P.
        n_heads: H.
        eps: added to the mean square.
        norm_first: w ∘ RMS_head(y) ∘ SiLU(z) instead.
    """

    def __init__(self, inner: int, n_heads: int, eps: float, *, norm_first: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(inner))
        self.n_heads, self.eps, self.norm_first = n_heads, eps, norm_first

    def forward(self, y_BTI: Tensor, z_BTI: Tensor) -> Tensor:
        """Of y and z, each (B, T, H·P), the normed and gated y in the same shape; at least fp32."""
        y_BTI, gate_BTI = widen(y_BTI), F.silu(widen(z_BTI))
        if self.norm_first:
            return self._normed(y_BTI) * self.weight * gate_BTI
        return self._normed(y_BTI * gate_BTI) * self.weight

    def _normed(self, y_BTI: Tensor) -> Tensor:
        y_BTHP = split_heads(y_BTI, self.n_heads)
        return F.rms_norm(y_BTHP, y_BTHP.shape[-1:], eps=self.eps).flatten(2)


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


@torch.no_grad()
def random_projections_(mixer: nn.Module) -> None:
    """Draw the weights of ``in_proj`` and ``out_proj``, so that what they read keeps its size; no bias."""
    for projection in (mixer.in_proj, mixer.out_proj):
        assert isinstance(projection, nn.Linear)
        nn.init.normal_(projection.weight, std=1 / math.sqrt(projection.in_features))
        if projection.bias is not None:
            nn.init.zeros_(projection.bias)


def is_step(x_BT: Tensor, resets_BT: Tensor | None, cache: MixerCacheLayer | None) -> bool:
    """Whether this call is one token behind others, as almost all of generation is."""
    return x_BT.shape[1] == 1 and resets_BT is None and cache is not None and cache.has_past()


def through_cache(
    cache: MixerCacheLayer | None,
    inputs: Sequence[Tensor],
    resets_BT: Tensor | None,
    step: Callable[[Tensor], Tensor],
    whole: Callable[[Tensor | None], tuple[Tensor, Tensor]],
) -> Tensor:
    """y_BTHP of a recurrence that goes on from the cache's state, which is then brought up to date.

    Args:
        inputs: what is computed from, (B, T, …).
        step: y_BHP of a single token; it overwrites the state it is given.
        whole: y_BTHP and the final state from the state before, or from none.
    """
    state_BHPN = None if cache is None else cache.state()
    # Where autograd will want the state as it was, it must not be overwritten.
    in_graph = state_BHPN is not None and any(tensor.requires_grad for tensor in (state_BHPN, *inputs))
    if state_BHPN is not None and is_step(inputs[0], resets_BT, cache) and not in_graph:
        y_BTHP = step(state_BHPN).unsqueeze(1)
    else:
        y_BTHP, final_BHPN = whole(state_BHPN)
        if cache is not None:
            cache.replace_state(final_BHPN)
    if cache is not None:
        cache.advance(inputs[0].shape[1])
    return y_BTHP


def bytes_with_inputs(state_numel: int, conv1d: nn.Conv1d, dtype: torch.dtype) -> int:
    """What a cache holds of a sequence in a model of ``dtype``: a state, which is widened, and the inputs, as made."""
    inputs = conv1d.in_channels * (conv1d.kernel_size[0] - 1)
    return state_numel * torch.promote_types(dtype, torch.float32).itemsize + inputs * dtype.itemsize


def consecutive(widths: dict[str, int]) -> dict[str, slice]:
    """Where each part lies when parts of these widths follow one another."""
    ends = list(accumulate(widths.values()))
    return {name: slice(end - width, end) for (name, width), end in zip(widths.items(), ends, strict=True)}


def in_convolution(rows: dict[str, slice], name: str) -> slice:
    """Where the convolution has the rows of ``in_proj`` called ``name``: only a gate that comes first passes it by."""
    before = rows["z"].stop if next(iter(rows)) == "z" else 0
    return slice(rows[name].start - before, rows[name].stop - before)


def split_heads(x_BTC: Tensor, n_heads: int) -> Tensor:
    """(B, T, H·P) to (B, T, H, P), of whatever width a head has."""
    return x_BTC.unflatten(-1, (n_heads, -1))


def mask_positions(x_BTC: Tensor, valid_BT: Tensor | None) -> Tensor:
    """Zero at padding."""
    return x_BTC if valid_BT is None else x_BTC * valid_BT[..., None].to(x_BTC.dtype)


def between_tokens(matrix_BHTT: Tensor, valid_BT: Tensor | None) -> Tensor:
    """The same, (B, H, T, T), with zeros in the rows and columns of padding."""
    if valid_BT is None:
        return matrix_BHTT
    return matrix_BHTT.masked_fill(~(valid_BT[:, None, :, None] & valid_BT[:, None, None]), 0)


def inverse_softplus(y: Tensor) -> Tensor:
    """x with softplus(x) = y, for y > 0."""
    return y + torch.log(-torch.expm1(-y))


def widen(x: Tensor) -> Tensor:
    """At least fp32: a decay near one raised to thousands of positions does not survive bf16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
