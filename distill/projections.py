"""Queries, keys, values and output as linear maps of their own, wherever a family keeps their weights.

    apart            q_proj, k_proj, v_proj                     Llama and most
    fused, blocks    all of q | all of k | all of v             Phi-3's qkv_proj, GPT-2's c_attn
    fused, groups    q…q k v | q…q k v | …                      one group a key/value head: GPT-NeoX, Falcon

GPT-2 keeps its weights as (in, out), everybody else as (out, in). H query heads, K key/value heads, P channels a head,
D hidden size.
"""

from dataclasses import dataclass
from typing import Any, Protocol, cast

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from distill.within import within


class Projection(Protocol):
    """A linear map. Weights are read when they are asked for: an engine may have them whole only at times."""

    @property
    def weight(self) -> Tensor:
        """(out, in)."""

    @property
    def bias(self) -> Tensor | None:
        """(out,)."""

    def __call__(self, x: Tensor, /) -> Tensor:
        """(..., in) to (..., out)."""


@dataclass(frozen=True)
class Heads:
    """A linear map that is some heads of a larger module.

    Attributes:
        module: a linear layer, or a ``Conv1D``, whose weight is (in, out).
        groups: equal parts that the module's outputs fall into, a whole number of heads each.
        heads: which heads of every group are meant.
        head_dim: P.
    """

    module: Any
    groups: int
    heads: slice
    head_dim: int

    @property
    def weight(self) -> Tensor:
        whole = self.module.weight
        return self._chosen(whole.t() if isinstance(self.module, Conv1D) else whole)

    @property
    def bias(self) -> Tensor | None:
        return None if self.module.bias is None else self._chosen(self.module.bias)

    def __call__(self, x: Tensor, /) -> Tensor:
        return within(self.module, lambda: F.linear(x, self.weight, self.bias))

    def _chosen(self, rows: Tensor) -> Tensor:
        by_head = rows.unflatten(0, (self.groups, -1, self.head_dim))
        return by_head[:, self.heads].flatten(0, 2)


def module_of(projection: Projection) -> nn.Module:
    """The module that is called for it."""
    return projection.module if isinstance(projection, Heads) else cast(nn.Module, projection)


def is_linear(module: object) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def out_features(module: Any) -> int:
    """Also of a module whose weight an engine has in pieces."""
    return int(module.nf if isinstance(module, Conv1D) else module.out_features)


def whole(module: Any) -> Projection:
    """A module that is one projection, all of it."""
    return Heads(module, 1, slice(None), 1) if isinstance(module, Conv1D) else module


def split(module: Any, n_heads: int, n_kv_heads: int, head_dim: int, *, grouped: bool) -> tuple[Heads, Heads, Heads]:
    """q, k and v of a fused projection.

    Args:
        module: its outputs are (H + 2K)·P.
        grouped: each key/value head stands behind its query heads; else all queries come first, then keys, then values.
    """
    groups = n_kv_heads if grouped else 1
    queries, keys = n_heads // groups, n_kv_heads // groups
    places = (slice(0, queries), slice(queries, queries + keys), slice(queries + keys, queries + 2 * keys))
    q, k, v = (Heads(module, groups, place, head_dim) for place in places)
    return q, k, v
