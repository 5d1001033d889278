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
    mixer             H P N + its convolution's inputs,      4 H P N operations a token (written, read)

Projections, MLPs and the head come on top, of both alike.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from distill.conversion import empty_model
from distill.layout import ATTENTION
from distill.student import mixers_of, state_bytes

CONTEXTS = (1024, 4096, 32768, 131072)


@dataclass(frozen=True)
class Footprint:
    """Of one student; its teacher is the same with attention in every layer.

    Attributes:
        parameters: tied ones once.
        state_bytes: what all mixers remember, fp32.
        scan_operations: of all mixers, a token.
        windows: of every layer, how far back attention there sees or saw; None for everything.
        kept: the layers that keep attention.
        kv_bytes: of one attention layer, a token of context, in the dtype of the weights.
        attention_operations: of one attention layer, a token, for a token of context.
    """

    parameters: int
    state_bytes: int
    scan_operations: int
    windows: tuple[int | None, ...]
    kept: tuple[int, ...]
    kv_bytes: int
    attention_operations: int

    def student_bytes(self, tokens: int) -> int:
        return self.state_bytes + self.kv_bytes * self._seen(tokens, self.kept)

    def teacher_bytes(self, tokens: int) -> int:
        return self.kv_bytes * self._seen(tokens, range(len(self.windows)))

    def student_operations(self, tokens: int) -> int:
        return self.scan_operations + self.attention_operations * self._seen(tokens, self.kept)

    def teacher_operations(self, tokens: int) -> int:
        return self.attention_operations * self._seen(tokens, range(len(self.windows)))

    def _seen(self, tokens: int, layers: Any) -> int:
        """Tokens of context that these layers look at, added up."""
        windows = [self.windows[layer] for layer in layers]
        return sum(tokens if window is None else min(tokens, window) for window in windows)


def footprint_of(config: PreTrainedConfig) -> Footprint:
    """From a student's config alone; no weight is in memory."""
    student, text = empty_model(config), config.get_text_config()
    kinds = config.distill["layers"]
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    mixer = config.distill["mixer"]
    scan = 4 * mixer["n_heads"] * mixer["head_dim"] * mixer["state_dim"]
    return Footprint(
        parameters=sum(parameter.numel() for parameter in student.parameters()),
        state_bytes=state_bytes(student),
        scan_operations=scan * len(mixers_of(student)),
        windows=_windows(text, len(kinds)),
        kept=tuple(index for index, kind in enumerate(kinds) if kind == ATTENTION),
        kv_bytes=2 * kv_heads * head_dim * dtype.itemsize,
        attention_operations=4 * heads * head_dim,
    )


def _windows(text: Any, n_layers: int) -> tuple[int | None, ...]:
    """Per layer where the config tells layers apart (Qwen2 mixes both kinds), else one for all (Mistral)."""
    window, kinds = getattr(text, "sliding_window", None), getattr(text, "layer_types", None)
    return tuple(window if kinds is None or kinds[index] == "sliding_attention" else None for index in range(n_layers))
