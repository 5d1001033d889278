"""What the Mamba-2 mixers share: running the terms of a scan, with or without a cache, or writing out its matrix."""

from dataclasses import dataclass

import torch
from torch import Tensor

from distill.cache import MixerCacheLayer
from distill.mixers.parts import through_cache, widen
from distill.ssd import mixing_matrix, scan, scan_step
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

    @property
    def values(self) -> Tensor:
        """x."""
        return self.x_BTHP

    def run(self, *, resets_BT: Tensor | None, cache: MixerCacheLayer | None) -> Tensor:
        """y_BTHP = scan + D x in fp32. With a cache it continues from the state there, and brings that up to date."""
        x_BTHP = widen(self.x_BTHP)
        inputs = self.x_BTHP, self.B_BTHN, self.C_BTHN, self.log_decay_BTH

        def step(state_BHPN: Tensor) -> Tensor:
            written_BTHP = _written(x_BTHP, self.step_BTH)
            return scan_step(
                self.log_decay_BTH[:, 0], self.B_BTHN[:, 0], self.C_BTHN[:, 0], written_BTHP[:, 0], state_BHPN
            )

        y_BTHP = through_cache(
            cache, inputs, resets_BT, step, lambda state_BHPN: _scan(self, x_BTHP, state_BHPN, resets_BT)
        )
        return torch.addcmul(y_BTHP, widen(self.skip_H)[:, None], x_BTHP)

    def matrix(self, *, resets_BT: Tensor | None) -> Tensor:
        """M + D·I with the step sizes in its columns, so that ``matrix @ x`` is :meth:`run`; (B, H, T, T), fp32."""
        with torch.autocast(self.x_BTHP.device.type, enabled=False):
            matrix_BHTT = mixing_matrix(
                widen(self.log_decay_BTH), widen(self.B_BTHN), widen(self.C_BTHN), resets_BT=resets_BT
            )
            if self.step_BTH is not None:
                matrix_BHTT = matrix_BHTT * widen(self.step_BTH).mT[:, :, None, :]
            return matrix_BHTT + torch.diag_embed(widen(self.skip_H)[:, None].expand(-1, matrix_BHTT.shape[-1]))

    def factors(self, *, resets_BT: Tensor | None) -> MatrixFactors:
        """What :meth:`matrix` is made of, documents apart, which have no say in it."""
        return MatrixFactors(self.log_decay_BTH, self.B_BTHN, self.C_BTHN, self.step_BTH, self.skip_H)


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
    """Δ x, (B, T, H, P), which goes into the state."""
    return x_BTHP if step_BTH is None else x_BTHP * step_BTH[..., None]
