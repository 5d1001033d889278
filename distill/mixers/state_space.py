"""What the Mamba-2 mixers share: running the terms of a scan, with or without a cache, or writing out its matrix."""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from distill.cache import MixerCacheLayer
from distill.ssd import causal_convolution, convolution_step, mixing_matrix, scan, scan_step
from distill.ssd.backends import backend
from distill.ssd.factors import MatrixFactors
from distill.ssd.kernels import mamba_ssm_scan


@dataclass(frozen=True)
class ScanTerms:
    """Everything ``y = M x + D x`` needs, per position; what a mixer computes from its hidden states.

    Attributes:
        x_BTHP: values.
        B_BTHN: what a position writes with.
        C_BTHN: what a position reads with.
        log_decay_BTH: logarithm of the decay, ≤ 0; 0 at padding.
        step_BTH: step size that scales what is written; None means 1.
        skip_H: weight D of the position's own value.
        rate_H: A < 0 of a mixer whose log decay is Δ A; None where the decay is not made of the step size.
    """

    x_BTHP: Tensor
    B_BTHN: Tensor
    C_BTHN: Tensor
    log_decay_BTH: Tensor
    step_BTH: Tensor | None
    skip_H: Tensor
    rate_H: Tensor | None = None


def run(terms: ScanTerms, *, resets_BT: Tensor | None, cache: MixerCacheLayer | None) -> Tensor:
    """y_BTHP = scan + D x in fp32. With a cache the scan continues from its state, which is then brought up to date."""
    x_BTHP = widen(terms.x_BTHP)
    state_BHPN = None if cache is None else cache.state()
    if state_BHPN is not None and is_step(x_BTHP, resets_BT, cache) and not _in_graph(terms, state_BHPN):
        written_BTHP = _written(x_BTHP, terms.step_BTH)
        y_BTHP = scan_step(
            terms.log_decay_BTH[:, 0], terms.B_BTHN[:, 0], terms.C_BTHN[:, 0], written_BTHP[:, 0], state_BHPN
        ).unsqueeze(1)
    else:
        y_BTHP, final_BHPN = _scan(terms, x_BTHP, state_BHPN, resets_BT)
        if cache is not None:
            cache.replace_state(final_BHPN)
    if cache is not None:
        cache.advance(x_BTHP.shape[1])
    return torch.addcmul(y_BTHP, widen(terms.skip_H)[:, None], x_BTHP)


def _scan(
    terms: ScanTerms, x_BTHP: Tensor, state_BHPN: Tensor | None, resets_BT: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y_BTHP and the final state; x is the terms' own, widened. A kernel that wants Δ and A apart is asked here."""
    if terms.step_BTH is not None and terms.rate_H is not None:
        dtype = torch.promote_types(terms.B_BTHN.dtype, terms.C_BTHN.dtype)
        if backend(terms.x_BTHP.device, dtype, stepped=True) == "mamba_ssm":
            inputs = terms.step_BTH, terms.rate_H, terms.B_BTHN, terms.C_BTHN, terms.x_BTHP
            y_BTHP, final_BHPN = mamba_ssm_scan(*inputs, state_BHPN, resets_BT)
            return widen(y_BTHP), final_BHPN
    return scan(
        terms.log_decay_BTH,
        terms.B_BTHN,
        terms.C_BTHN,
        _written(x_BTHP, terms.step_BTH),
        initial_state_BHPN=state_BHPN,
        resets_BT=resets_BT,
    )


def _written(x_BTHP: Tensor, step_BTH: Tensor | None) -> Tensor:
    return x_BTHP if step_BTH is None else x_BTHP * step_BTH[..., None]


def _in_graph(terms: ScanTerms, state_BHPN: Tensor) -> bool:
    """Whether autograd will want the state as it was, so that it must not be overwritten."""
    return any(
        tensor.requires_grad for tensor in (state_BHPN, terms.x_BTHP, terms.B_BTHN, terms.C_BTHN, terms.log_decay_BTH)
    )


def matrix(terms: ScanTerms, *, resets_BT: Tensor | None) -> Tensor:
    """M + D·I with the step sizes in its columns, so that ``matrix @ x`` is :func:`run`; (B, H, T, T), fp32."""
    with torch.autocast(terms.x_BTHP.device.type, enabled=False):
        matrix_BHTT = mixing_matrix(
            widen(terms.log_decay_BTH), widen(terms.B_BTHN), widen(terms.C_BTHN), resets_BT=resets_BT
        )
        if terms.step_BTH is not None:
            matrix_BHTT = matrix_BHTT * widen(terms.step_BTH).mT[:, :, None, :]
        return matrix_BHTT + torch.diag_embed(widen(terms.skip_H)[:, None].expand(-1, matrix_BHTT.shape[-1]))


def factors(terms: ScanTerms) -> MatrixFactors:
    """What :func:`matrix` is made of, documents apart."""
    return MatrixFactors(terms.log_decay_BTH, terms.B_BTHN, terms.C_BTHN, terms.step_BTH, terms.skip_H)


class ShortConvolution(nn.Conv1d):
    """The depthwise causal convolution, with the parameters' names and shapes of every Mamba implementation.

    Args:
        channels: C.
        width: taps, the current position's included.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__(channels, channels, width, groups=channels, bias=True)

    @torch.no_grad()
    def open_(self) -> None:
        """Let only the current position pass, unchanged."""
        assert self.bias is not None
        self.weight.zero_()
        self.weight[:, 0, -1] = 1.0
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
        assert self.bias is not None
        n_past = self.kernel_size[0] - 1
        weight_CK, bias_C = self.weight.squeeze(1).to(x_BTC.dtype), self.bias.to(x_BTC.dtype)
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


def cache_layer(cache: Any, layer_idx: int) -> MixerCacheLayer | None:
    """This layer's part of a Hugging Face cache; ``distill.student`` puts it there before the decoder runs."""
    if cache is None:
        return None
    layer = cache.layers[layer_idx]
    assert isinstance(layer, MixerCacheLayer), f"cache layer {layer_idx} is a {type(layer).__name__}"
    return layer


def inverse_softplus(y: Tensor) -> Tensor:
    """x with softplus(x) = y, for y > 0."""
    return y + torch.log(-torch.expm1(-y))


def widen(x: Tensor) -> Tensor:
    """At least fp32: a decay near one raised to thousands of positions does not survive bf16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
