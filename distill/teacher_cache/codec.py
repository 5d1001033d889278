"""How a teacher's top-k predictions are written: one record of a fixed size for each position of a block.

    field       type        what
    low         k × uint16  the k token ids in ascending order, their low 16 bits
    counts      b × uint8   how many of them lie in each range of 65,536 ids but the last
                            (b = ⌈V / 65,536⌉ − 1: none up to 65,536 tokens, 1 for Llama 3, 3 for Gemma)
    codes       k × uint8   c: how far each token's log-probability lies under the best one's
    span        float16     d_max: how far under it the lowest lies, in nats
    log_tail    float16     log of the mass of all other tokens; −inf if the k are the whole vocabulary

Everything is little-endian, without padding: 3k + b + 4 bytes, so 196 to 199 at k = 64 for up to 262,144 tokens.

    distance    d_i = d_max · (c_i / 255)²                        finer near 0, where the mass is
    together    p_i = (1 − tail) · exp(−d_i) / Σ_j exp(−d_j)      so that Σ p_i + tail = 1

The best token has c = 0 and d = 0 exactly; no distance is off by more than half a step, √(d · d_max) / 255 +
d_max / 260,100. ``scripts/bench_offline_teacher.py`` measures what that costs, beside other codes.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.objectives.topk import TopK

LARGEST_K = 255
"""``counts`` are single bytes."""

_BUCKET = 2**16
_STEPS = 255
_FARTHEST = 64.0
"""Nats: e⁻⁶⁴ is nothing beside 1, and one token that a teacher rules out would coarsen the code of the others."""
_SMALLEST = float(np.finfo(np.float16).smallest_subnormal)


@dataclass(frozen=True)
class Codec:
    """Turns top-k predictions into records and back.

    Attributes:
        vocabulary: V, the number of logits.
        top_k: tokens kept at each position, at most ``LARGEST_K``; all of a smaller vocabulary.
    """

    vocabulary: int
    top_k: int

    @cached_property
    def record(self) -> np.dtype:
        """The layout of one position's record, its size as ``itemsize``."""
        assert 1 <= self.k <= LARGEST_K, f"k is {self.k}"
        fields: list[Any] = [
            ("low", "<u2", (self.k,)),
            ("counts", "u1", (-(-self.vocabulary // _BUCKET) - 1,)),
            ("codes", "u1", (self.k,)),
            ("span", "<f2"),
            ("log_tail", "<f2"),
        ]
        return np.dtype(fields)

    @property
    def k(self) -> int:
        """Tokens in a record."""
        return min(self.top_k, self.vocabulary)

    def encode(self, top: TopK) -> NDArray[np.void]:
        """Records of the shape of ``top.log_tail_BT``."""
        ids_BTK = top.ids_BTK.cpu().numpy()
        by_id_BTK = ids_BTK.argsort(-1)
        ids_BTK = np.take_along_axis(ids_BTK, by_id_BTK, -1)
        log_probs_BTK = np.take_along_axis(top.log_probs_BTK.cpu().numpy(), by_id_BTK, -1)

        records_BT = np.zeros(ids_BTK.shape[:-1], self.record)
        records_BT["low"] = ids_BTK % _BUCKET
        for bucket in range(records_BT["counts"].shape[-1]):
            records_BT["counts"][..., bucket] = (ids_BTK // _BUCKET == bucket).sum(-1)
        distance_BTK = (log_probs_BTK.max(-1, keepdims=True) - log_probs_BTK).clip(0, _FARTHEST)
        records_BT["span"] = distance_BTK.max(-1)
        span_BT1 = records_BT["span"][..., None].astype(np.float32)
        share_BTK = (distance_BTK / span_BT1.clip(_SMALLEST)).clip(0, 1)
        records_BT["codes"] = np.rint(_STEPS * np.sqrt(share_BTK))
        with np.errstate(over="ignore"):  # a tail below e⁻⁶⁵⁵⁰⁴ is none
            # The top k never lose all their mass to rounding.
            records_BT["log_tail"] = top.log_tail_BT.cpu().numpy().clip(max=-_SMALLEST)
        return records_BT

    def decode(self, records_BT: NDArray[np.void]) -> TopK:
        """What the records say: ids ascending, fp32 log-probabilities that sum to 1 together with the tail."""
        low_BTK, counts_BTb, codes_BTK, span_BT, log_tail_BT = (
            torch.from_numpy(np.ascontiguousarray(records_BT[name]).astype(dtype))
            for name, dtype in (("low", "i8"), ("counts", "i8"), ("codes", "f4"), ("span", "f4"), ("log_tail", "f4"))
        )
        # Entry i lies behind every range whose ids end before it.
        ends_BT1b = counts_BTb.cumsum(-1)[..., None, :]
        bucket_BTK = (ends_BT1b <= torch.arange(self.k)[:, None]).sum(-1)
        distance_BTK = span_BT[..., None] * (codes_BTK / _STEPS) ** 2
        log_top_BT1 = _log1mexp(log_tail_BT)[..., None]
        return TopK(low_BTK + _BUCKET * bucket_BTK, (-distance_BTK).log_softmax(-1) + log_top_BT1, log_tail_BT)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 − eˣ) for x < 0, exact near 0 and near −∞ (Mächler 2012, "Accurately computing log(1 − exp(−|a|))")."""
    return torch.where(x > -0.6931, (-x.expm1()).log(), (-x.exp()).log1p())
