"""The teacher's own attention that sees the first tokens and the latest ones: the mixer that others are measured by.

::

    out = attention(u), each query over what `distill.window` lets it see

The weights are the attention's, under its own names; they train as those of any mixer do. A student may have it in all
layers that do not keep attention, or in some beside those of another mixer (``window_layers``), as BASED and Samba
(arXiv 2406.07522) do. It remembers the keys and values of ``window + sinks`` tokens, however long the context.
Positions are the attention's, whatever ``rope`` says.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from distill.decoder_inputs import CACHES
from distill.mixers.rotary import Rotation
from distill.visible import visible
from distill.window import Window, put_window


class SlidingWindowMixer(nn.Module):
    """Attention behind a window, with the call signature of a mixer.

    Args:
        attention: the layer's; it becomes a part of this one.
        window: tokens that a query sees, its own counted.
        sinks: tokens at the beginning of a document that it sees besides.
        own_window: the attention's own window, in which sinks stay until it is full; None for a layer without.
        n_kv_heads, head_dim: of the attention.
        layer_idx: place in the decoder.
        shape: what other mixers are built with; not used.

    Attributes:
        projections_frozen: asked of every mixer; attention is not held back by it.
        without_factors: why its matrix has none.
    """

    of_attention = True
    kept_heads = ()
    projections_frozen = False
    without_factors = "its matrix is a softmax, and starts as the teacher's but for what the window hides"

    def __init__(
        self,
        attention: nn.Module,
        *,
        window: int,
        sinks: int,
        own_window: int | None,
        n_kv_heads: int,
        head_dim: int,
        layer_idx: int = 0,
        **_shape: Any,
    ) -> None:
        super().__init__()
        self.attention = attention
        self.window, self.sinks, self.own_window = window, sinks, own_window
        self.n_kv_heads, self.head_dim = n_kv_heads, head_dim
        self._takes = tuple(inspect.signature(attention.forward).parameters)
        put_window(attention, layer_idx, Window((layer_idx,), window, sinks), own_window)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        valid_BT: Tensor | None = None,
        resets_BT: Tensor | None = None,
        position_embeddings: Rotation | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """Attend. Shapes (B, T, D) to (B, T, D); the second result stands for attention weights.

        Args:
            attention_mask: as the decoder makes it; without one, padding and documents say what is seen.
            cache: of keys and values, of which this layer holds ``window + sinks``.
            past_key_values: the same, under the name transformers gave it before 5.24.
            valid_BT: False at padding.
            resets_BT: True where a packed document begins.
            position_embeddings: (cos, sin) as the decoder hands them to attention.
        """
        if attention_mask is None:
            attention_mask = self._mask(hidden_states, valid_BT, resets_BT)
        memory = past_key_values if cache is None else cache
        caches = {name: memory for name in ("cache", *CACHES) if name in self._takes}
        known = {"attention_mask": attention_mask, "position_embeddings": position_embeddings, **caches}
        rest = {name: value for name, value in others.items() if name not in CACHES}
        asked = {name: value for name, value in known.items() if name in self._takes}
        output = self.attention(hidden_states, **asked, **rest)
        return (output[0] if isinstance(output, tuple) else output), None

    def _mask(self, hidden_BTD: Tensor, valid_BT: Tensor | None, resets_BT: Tensor | None) -> Tensor | None:
        """(B or 1, 1, T, T), what a decoder would hand out: the layer's own window is in it, the narrower one is not.

        Eager attention adds its mask, and knows nothing of causality without one; sdpa needs none to be causal.
        """
        config: Any = self.attention.config
        eager = config._attn_implementation == "eager"
        if not eager and valid_BT is None and resets_BT is None and self.own_window is None:
            return None
        seen_B1TT = visible(hidden_BTD, valid_BT, resets_BT, window=self.own_window)
        if not eager:
            return seen_B1TT
        hidden = ~seen_B1TT
        return torch.zeros_like(hidden, dtype=hidden_BTD.dtype).masked_fill(hidden, torch.finfo(hidden_BTD.dtype).min)

    def state_bytes(self, dtype: torch.dtype) -> int:
        """Bytes remembered per sequence in a model of ``dtype``: keys and values."""
        return 2 * self.n_kv_heads * self.head_dim * (self.window + self.sinks) * dtype.itemsize
