"""What a student remembers and does per token of generation, and what its teacher would: by formula, from the config.

========  =============================================================================
symbol    meaning
========  =============================================================================
T         tokens of context; of a layer with a sliding window W at most W
H, P, N   a mixer's heads, channels a head, state size a head
h, K, p   attention's query heads, key/value heads, channels a head
========  =============================================================================

::

    attention layer   2 K p T numbers of keys and values,    4 h p T operations a token (scores, weighted sum)
    mixer             H P N in fp32, convolution's inputs,   4 H P N operations a token (written, read)
    behind a window   2 K p T and 4 h p T, with window + sinks for T

Projections, MLPs and the head come on top, of both alike.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig

from distill.attention import AttentionView, views
from distill.conversion import empty_model
from distill.layout import ATTENTION, WINDOWED
from distill.mixers import FEATURES
from distill.mixers.kept_heads import KeptHeads
from distill.student import state_bytes, teacher_class


class AttentionCost(NamedTuple):
    """Of one attention layer, for every token of context it looks at.

    Attributes:
        kv_bytes: keys and values, in the dtype of the weights.
        operations: of a generated token.
        window: how far back it looks; None for everything.
    """

    kv_bytes: int
    operations: int
    window: int | None


@dataclass(frozen=True)
class Footprint:
    """Of one student; its teacher has attention in every layer.

    Attributes:
        parameters: tied ones once.
        state_bytes: what all mixers remember: states in fp32, the rest in the dtype of the weights.
        scan_operations: of all mixers, a token.
        layers: what attention costs in each layer, kept or not.
        kept: the layers that keep attention.
        heads: what single heads beside mixers cost, a layer each.
    """

    parameters: int
    state_bytes: int
    scan_operations: int
    layers: tuple[AttentionCost, ...]
    kept: tuple[int, ...]
    heads: tuple[AttentionCost, ...] = ()

    def student_bytes(self, tokens: int) -> int:
        return self.state_bytes + sum(layer.kv_bytes * _seen(layer, tokens) for layer in self._kept())

    def teacher_bytes(self, tokens: int) -> int:
        return sum(layer.kv_bytes * _seen(layer, tokens) for layer in self.layers)

    def student_operations(self, tokens: int) -> int:
        return self.scan_operations + sum(layer.operations * _seen(layer, tokens) for layer in self._kept())

    def teacher_operations(self, tokens: int) -> int:
        return sum(layer.operations * _seen(layer, tokens) for layer in self.layers)

    def _kept(self) -> list[AttentionCost]:
        return [*(self.layers[index] for index in self.kept), *self.heads]


def footprint_of(config: PreTrainedConfig) -> Footprint:
    """From a student's config alone; no weight is in memory."""
    student, kinds = empty_model(config), config.distill["layers"]
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    attention = views(empty_model(teacher_config(config)), range(len(kinds)))
    return Footprint(
        parameters=sum(parameter.numel() for parameter in student.parameters()),
        state_bytes=state_bytes(student, dtype),
        scan_operations=sum(
            _mixing(kind, config.distill["mixer"], attention[index])
            for index, kind in enumerate(kinds)
            if kind != ATTENTION
        ),
        layers=tuple(_cost(attention[index], dtype) for index in range(len(kinds))),
        kept=tuple(index for index, kind in enumerate(kinds) if kind == ATTENTION),
        heads=tuple(_cost_of_heads(module, dtype) for module in student.modules() if isinstance(module, KeptHeads)),
    )


def _mixing(kind: str, mixer: dict[str, Any], attention: AttentionView) -> int:
    """Operations a token: a state written and read, and with the delta rule what a key finds taken back."""
    if kind == WINDOWED:
        return 4 * attention.n_heads * attention.head_dim * (mixer["window"] + mixer["sinks"])
    channels = mixer["n_heads"] * mixer["head_dim"]
    if kind in FEATURES:
        return 4 * (channels + mixer["n_heads"]) * FEATURES[kind](mixer["state_dim"])
    return (6 if kind == "gated_deltanet" else 4) * channels * mixer["state_dim"]


def teacher_config(student: PreTrainedConfig) -> PreTrainedConfig:
    """The config of a student's teacher, of its stock class."""
    stock: Any = teacher_class(student).config_class
    ours = ("model_type", "architectures", "auto_map", "distill", "transformers_version")
    return stock(**{key: value for key, value in student.to_dict().items() if key not in ours})


def _cost(attention: AttentionView, dtype: torch.dtype) -> AttentionCost:
    width = attention.head_dim
    kv_bytes = 2 * attention.n_kv_heads * width * dtype.itemsize
    return AttentionCost(kv_bytes, 4 * attention.n_heads * width, attention.sliding_window)


def _cost_of_heads(kept: KeptHeads, dtype: torch.dtype) -> AttentionCost:
    kv_bytes = 2 * len(kept.kv_heads) * kept.head_dim * dtype.itemsize
    return AttentionCost(kv_bytes, 4 * len(kept.heads) * kept.head_dim, kept.window)


def _seen(layer: AttentionCost, tokens: int) -> int:
    return tokens if layer.window is None else min(tokens, layer.window)
