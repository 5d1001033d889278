"""A loss over the vocabulary that runs through the language-model head chunk by chunk, gradients included.

    logits = cap(s · (h Wᵀ + b))          cap(x) = c·tanh(x/c), where the family caps its logits

For a chunk of rows the logits are made, then the loss and its gradient for them, and at once the products of that
gradient with W (for the rows) and with the rows (for W, added up in place). So a chunk is all that is ever there of a
tokens × vocabulary tensor, logits are made once, and backward only scales. The idea is that of Liger-Kernel (Hsu et
al. 2024, arXiv 2410.10989, section 3.2) and Cut Cross-Entropy (Wijmans et al. 2024, arXiv 2411.09009).

How many rows: every chunk reads W three times, a teacher's head once, and reads and writes W's gradient, so with few
rows the products wait for memory; with many, scratch tensors grow. On a CPU, 128K tokens and D = 1024, all products of
512 rows alone take 9.7 to 11.7 CPU seconds, and with everything else in chunks of 32, 64, 128, 256 rows 14.7, 12.7,
11.2, 10.6. ``chunk_rows`` stays where little is left to gain.

N scored rows, n of them in a chunk, D width, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distill.objectives.by_hand import Buffers

CHUNK_BYTES = 2**26
"""Of one chunk's fp32 logits; a divergence works on three or four such tensors."""

FEWEST_ROWS, MOST_ROWS = 128, 1024
"""Fewer would wait for the head's weights, whatever the vocabulary; with more, little is left to gain."""

VOCABULARY_SLICE = 2**14
"""Rows of the head's gradient that a product in 16 bits is made of at a time, before it is added in fp32."""


def chunk_rows(vocabulary: int) -> int:
    """Rows of a chunk."""
    return min(MOST_ROWS, max(FEWEST_ROWS, CHUNK_BYTES // (4 * vocabulary)))


@dataclass(frozen=True)
class Head:
    """A linear language-model head and what follows it.

    Attributes:
        weight_VD: (V, D), any float dtype.
        bias_V: (V,) or None.
        scale: s, on weight and bias together.
        softcap: c; None where logits are not capped.
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def vocabulary(self) -> int:
        return self.weight_VD.shape[0]

    def computing_in(self, dtype: torch.dtype) -> "Head":
        """The same with its weight in ``dtype``, as autocast would have it."""
        return Head(self.weight_VD.to(dtype), self.bias_V, self.scale, self.softcap)

    def logits(self, hidden_ND: Tensor, out_NV: Tensor) -> Tensor:
        """Fill ``out_NV``, which is in fp32 or fp64, through a product in the dtype of the weight."""
        weight_DV = self.weight_VD.t()
        if out_NV.dtype == self.weight_VD.dtype:
            torch.mm(hidden_ND, weight_DV, out=out_NV)
        else:
            out_NV.copy_(hidden_ND @ weight_DV)
        if self.bias_V is not None:
            out_NV.add_(self.bias_V)
        if self.scale != 1:
            out_NV.mul_(self.scale)
        if self.softcap is not None:
            out_NV.div_(self.softcap).tanh_().mul_(self.softcap)
        return out_NV

    def slope(self, logits_NV: Tensor, out_NV: Tensor) -> Tensor | None:
        """The derivative of each logit for what the linear layer gave, where it is not one number."""
        if self.softcap is None:
            return None
        # 1 − tanh², and tanh is the logit over c
        return torch.square(logits_NV, out=out_NV).mul_(-self.scale / self.softcap**2).add_(self.scale)


class ChunkLoss(Protocol):
    """The loss of the rows of a chunk."""

    def __call__(self, logits_NV: Tensor, rows: slice, buffers: Buffers) -> tuple[Tensor, Tensor]:
        """The loss of each row (N,), and the gradient of their sum for the logits, (N, V); overwrites ``logits_NV``.

        Args:
            logits_NV: the student's, fp32 or fp64.
            rows: which rows these are.
            buffers: scratch tensors.
        """


def loss_sum(hidden_ND: Tensor, head: Head, loss: ChunkLoss) -> Tensor:
    """The loss of all rows together, with gradients for hidden states, weight and bias.

    Args:
        hidden_ND: (N, D) the student's final hidden states; N may be 0.
        head: the student's.
        loss: of a chunk.

    Returns:
        A scalar in fp32 (fp64 for fp64 weights). Its backward pass can be run once: it scales the gradients in place.
    """
    grads = torch.is_grad_enabled()
    wanted = tuple(grads and x is not None and x.requires_grad for x in (hidden_ND, head.weight_VD, head.bias_V))
    return _OnePass.apply(hidden_ND, head.weight_VD, head.bias_V, head.scale, head.softcap, loss, wanted)


def chunks(n_rows: int, vocabulary: int, like: Tensor) -> list[tuple[slice, Buffers]]:
    """The slices of ``n_rows``, each with scratch tensors of its size; all slices share them."""
    most = min(n_rows, chunk_rows(vocabulary))
    kept: dict[str, Tensor] = {}

    def buffers_of(rows: slice) -> Buffers:
        def buffer(name: str) -> Tensor:
            if name not in kept:
                kept[name] = like.new_empty((most, vocabulary), dtype=full_dtype(like.dtype))
            return kept[name][: rows.stop - rows.start]

        return buffer

    slices = [slice(start, min(start + most, n_rows)) for start in range(0, n_rows, most)] if n_rows else []
    return [(rows, buffers_of(rows)) for rows in slices]


def full_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def product_dtype(weight: Tensor) -> torch.dtype:
    """What a linear layer computes in: autocast's dtype where that is on, else its weight's; fp64 stays."""
    kind = weight.device.type
    casts = torch.is_autocast_enabled(kind) and weight.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if casts else weight.dtype


class _OnePass(torch.autograd.Function):
    """Loss and gradients in forward. Of the weight nothing is kept: an engine may free or split it right after."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        scale: float,
        softcap: float | None,
        loss: ChunkLoss,
        wanted: tuple[bool, bool, bool],
    ) -> Tensor:
        dtype = product_dtype(weight_VD)
        with torch.autocast(weight_VD.device.type, enabled=False):
            head = Head(weight_VD, bias_V, scale, softcap).computing_in(dtype)
            gradients = _Gradients.zeros(hidden_ND, weight_VD, wanted)
            losses_N = _run(hidden_ND.to(dtype), head, loss, gradients)
        ctx.dtypes = tuple(None if x is None else x.dtype for x in (hidden_ND, weight_VD, bias_V))
        ctx.save_for_backward(gradients.hidden_ND, gradients.weight_VD, gradients.bias_V)
        return losses_N.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        # In place, since a copy of the head's gradient would be its largest cost. A second pass finds changed tensors
        # and is refused by autograd.
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        scaled = [None if x is None else x.mul_(factor).to(dtype) for x, dtype in pairs]
        return (*scaled, None, None, None, None)


@dataclass
class _Gradients:
    """Sums over chunks, fp32 or fp64; None where nobody wants them."""

    hidden_ND: Tensor | None
    weight_VD: Tensor | None
    bias_V: Tensor | None

    @classmethod
    def zeros(cls, hidden_ND: Tensor, weight_VD: Tensor, wanted: tuple[bool, bool, bool]) -> "_Gradients":
        dtype = full_dtype(weight_VD.dtype)
        shapes = hidden_ND.shape, weight_VD.shape, weight_VD.shape[:1]
        return cls(
            *(
                weight_VD.new_zeros(shape, dtype=dtype) if is_wanted else None
                for shape, is_wanted in zip(shapes, wanted, strict=True)
            )
        )

    def add(self, gradient_NV: Tensor, hidden_ND: Tensor, weight_VD: Tensor, rows: slice) -> None:
        """What a chunk adds: products in the dtype of ``weight_VD``, sums in full precision."""
        if self.bias_V is not None:
            self.bias_V.add_(gradient_NV.sum(0))
        gradient_NV = gradient_NV.to(weight_VD.dtype)
        if self.hidden_ND is not None:
            self.hidden_ND[rows] = gradient_NV @ weight_VD
        if self.weight_VD is None:
            return
        if self.weight_VD.dtype == gradient_NV.dtype:
            self.weight_VD.addmm_(gradient_NV.t(), hidden_ND)
            return
        for of_sum_VD, part_NV in zip(
            self.weight_VD.split(VOCABULARY_SLICE), gradient_NV.split(VOCABULARY_SLICE, dim=1), strict=True
        ):
            of_sum_VD.add_(part_NV.t() @ hidden_ND)

    def wanted(self) -> bool:
        return any(x is not None for x in (self.hidden_ND, self.weight_VD, self.bias_V))


def _run(hidden_ND: Tensor, head: Head, loss: ChunkLoss, gradients: _Gradients) -> Tensor:
    """The loss of every row, (N,)."""
    losses_N = hidden_ND.new_empty(len(hidden_ND), dtype=full_dtype(hidden_ND.dtype))
    for rows, buffers in chunks(len(hidden_ND), head.vocabulary, hidden_ND):
        logits_NV = head.logits(hidden_ND[rows], buffers("student"))
        slope_NV = head.slope(logits_NV, buffers("slope")) if head.softcap and gradients.wanted() else None
        losses_N[rows], gradient_NV = loss(logits_NV, rows, buffers)
        if not gradients.wanted():
            continue
        if slope_NV is not None:
            gradient_NV.mul_(slope_NV)
        elif head.scale != 1:
            gradient_NV.mul_(head.scale)
        gradients.add(gradient_NV, hidden_ND[rows], head.weight_VD, rows)
    return losses_N
