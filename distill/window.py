"""Attention that sees the first tokens and the latest ones: the mask, and a cache that holds no more.

    V_ts = 1 where query t may see key s in the layer as it is: causal, padding, documents, a window of its own
    r_ts = Σ_{u<s} V_tu        how many keys that t sees stand before s
    n_t  = Σ_u V_tu            how many it sees
    W_ts = V_ts ∧ (r_ts < sinks ∨ n_t − r_ts ≤ window)

is the mask of "Efficient Streaming Language Models with Attention Sinks" (Xiao et al. 2024): the ``sinks`` first
tokens of the document and the last ``window``, the query's own among them. All is counted among what a query sees:
padding is no sink, and neither is another document's token. Two things are as we chose:

- Positions stay what they were (rotary by the token's true position, not by its place in the cache): the teacher's
  weights are used as they are, on distances that they know.
- A layer with a window of its own sees nothing that it did not see before; its document's first tokens are sinks for as
  long as that window has not filled up.

A cache that grows holds ``window + sinks`` tokens here, no more, however long the context (:class:`WindowedLayer`). One
of a fixed size (``StaticCache``), whose tensors may not be cut down, keeps what it has room for, and the mask hides it.
"""

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, StaticCache

from distill.decoder_inputs import CACHES

SINKS = 4
_NOTE = "distill_windowed"


@dataclass(frozen=True)
class Window:
    """What chosen layers see: the ``sinks`` first tokens and the last ``window``."""

    layers: tuple[int, ...]
    window: int
    sinks: int = SINKS

    def __str__(self) -> str:
        return f"window {self.window} + {self.sinks} sink{'' if self.sinks == 1 else 's'}"


def seen(visible: Tensor, window: int, sinks: int, own: int | None = None) -> Tensor:
    """W from V (..., T, S), both bool: the equation on top.

    Args:
        own: the layer's own window, in which sinks stay until it is full; None for a layer without.
    """
    rank = visible.cumsum(dim=-1, dtype=torch.int32) - 1
    n = rank[..., -1:] + 1
    first = rank < sinks
    if own is not None:
        first &= n < own
    return visible & (first | (n - rank <= window))


class WindowedLayer(DynamicLayer):
    """Keys and values of no more than ``most`` tokens, and which columns of a mask they are.

    Attributes:
        columns_BS: of what is held, in each row its own; where a row sees fewer than ``most``, also some that it does
            not see, and no later query will.
        cumulative_length: tokens read; what the rest of the library takes for the cache's length.
    """

    is_croppable = False

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most
        self.cumulative_length = 0
        self.columns_BS: Tensor | None = None
        self._kept_BS: Tensor | None = None

    def expect(self, n_tokens: int, batch: int, device: torch.device) -> Tensor:
        """The columns (B, S) of the keys that the next ``update``, of so many tokens, will return."""
        new_BT = torch.arange(self.cumulative_length, self.cumulative_length + n_tokens, device=device)[None]
        new_BT = new_BT.expand(batch, -1)
        return new_BT if self.columns_BS is None else torch.cat([self.columns_BS.to(device), new_BT], dim=1)

    def keep(self, columns_BS: Tensor, seen_BS: Tensor | None) -> None:
        """Of these columns the next ``update`` keeps those that the last query sees; None keeps them all.

        A later query sees none that it does not, and no more than ``most`` of them.
        """
        if seen_BS is None or columns_BS.shape[1] <= self.most:
            self.columns_BS, self._kept_BS = columns_BS, None
            return
        places_BS = seen_BS.int().argsort(dim=-1, descending=True, stable=True)[:, : self.most]
        self.columns_BS, self._kept_BS = columns_BS.gather(1, places_BS), places_BS

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """All keys and values (B, K, S, P) that were held, with the new ones; then only some are held on to."""
        keys_BKSP, values_BKSP = super().update(key_states, value_states)
        self.cumulative_length += key_states.shape[-2]
        if self._kept_BS is not None:
            self.keys, self.values = _at(keys_BKSP, self._kept_BS), _at(values_BKSP, self._kept_BS)
        return keys_BKSP, values_BKSP

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def reset(self) -> None:
        super().reset()
        self.columns_BS = self._kept_BS = None

    def crop(self, tokens_to_remove: int) -> None:
        """What left the window is gone; only "remove nothing" is possible."""
        if tokens_to_remove != 0:
            raise ValueError("cannot remove tokens from a window: those before it are gone; start from an empty cache")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.columns_BS is not None:
            self.columns_BS = self.columns_BS.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        if self.columns_BS is not None:
            self.columns_BS = self.columns_BS[indices]


def put_window(attention: nn.Module, index: int, rule: Window, own: int | None) -> None:
    """Let a layer's attention see less, from its next call on, and hold no more than it sees in the cache.

    Args:
        attention: computed by ``eager`` or ``sdpa``.
        index: of the layer.
        own: the layer's own window.
    """
    names = tuple(inspect.signature(attention.forward).parameters)
    see_less = functools.partial(_see_less, index=index, rule=rule, own=own, names=names)
    attention.register_forward_pre_hook(see_less, with_kwargs=True)


def _see_less(
    _attention: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    index: int,
    rule: Window,
    own: int | None,
    names: tuple[str, ...],
) -> tuple[tuple[()], dict[str, Any]]:
    """Before a layer's attention runs: exchange its mask, and its place in the cache.

    Args:
        index: of the layer.
        own: its own window.
        names: of its arguments, in order.

    Raises:
        ValueError: for a cache of a kind that cannot be cut down, or one that another model filled.
    """
    kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
    hidden_BTD, mask = kwargs[names[0]], kwargs.get("attention_mask")
    given = [kwargs[name] for name in ("cache", *CACHES) if kwargs.get(name) is not None]
    if given and isinstance(given[0], StaticCache):
        kwargs["attention_mask"] = _in_static(given[0].layers[index], hidden_BTD, mask, rule, own)
        return (), kwargs
    held = _room(given[0], index, rule) if given else None
    n_new = hidden_BTD.shape[1]
    n_read = n_new + (0 if held is None else held.cumulative_length)
    columns_BS = None if held is None else held.expect(n_new, len(hidden_BTD), hidden_BTD.device)
    if n_read <= rule.window + (rule.sinks if own is None else 0):  # nothing to hide: not a number changes
        if held is not None and columns_BS is not None:
            held.keep(columns_BS, None)
        return (), kwargs
    kept = _kept(mask, n_new, n_read, rule, own, hidden_BTD.device)
    if held is not None and columns_BS is not None:
        before = n_read - kept.shape[-1]  # tokens that the mask of a layer with its own window leaves out
        kept, mask = (_columns(one, columns_BS - before) for one in (kept, mask))
        held.keep(columns_BS, kept[:, 0, -1])
    kwargs["attention_mask"] = _hiding(mask, kept)
    return (), kwargs


def _in_static(layer: Any, hidden_BTD: Tensor, mask: Tensor | None, rule: Window, own: int | None) -> Tensor | None:
    """The mask, less what is hidden, where all columns of a cache layer of a fixed size are handed out."""
    n_new = hidden_BTD.shape[1]
    n_columns = layer.get_mask_sizes(n_new)[0]
    if n_columns <= rule.window:
        return mask
    if mask is None:  # the library leaves it out where the cache is empty: token t then lies in column t
        mask = torch.ones(n_new, n_columns, dtype=torch.bool, device=hidden_BTD.device).tril()[None, None]
    return _hiding(mask, _kept(mask, n_new, n_columns, rule, own, hidden_BTD.device))


def _hiding(mask: Tensor | None, kept: Tensor) -> Tensor:
    """W in the form of the mask that a layer was handed."""
    return kept if mask is None or mask.dtype == torch.bool else mask.masked_fill(~kept, _least(mask))


def _kept(mask: Tensor | None, n_new: int, n_read: int, rule: Window, own: int | None, device: torch.device) -> Tensor:
    """W (B or 1, 1, T, S) of a call; layers that are handed the same mask share it."""
    if mask is None:
        causal = torch.ones(n_new, n_read, dtype=torch.bool, device=device).tril(n_read - n_new)
        return seen(causal[None, None], rule.window, rule.sinks, own)
    if mask.ndim != 4:
        raise ValueError(
            f"a window needs attention masks of 4 dimensions, and this layer was handed one of {mask.ndim}"
        )
    known, sizes = getattr(mask, _NOTE, {}), (rule.window, rule.sinks, own)
    if sizes not in known:
        visible = mask if mask.dtype == torch.bool else mask > _least(mask) / 2
        known[sizes] = seen(visible, *sizes)
        setattr(mask, _NOTE, known)  # lives as long as the mask does, which is one call of the model
    return known[sizes]


def _columns(mask: Any, columns_BS: Tensor) -> Any:
    """A mask (B or 1, 1, T, S) at each row's columns; those it does not reach back to (below 0) are hidden."""
    if mask is None:
        return None
    columns = columns_BS[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1)
    taken = mask.expand(len(columns_BS), -1, -1, -1).gather(-1, columns.clamp(min=0))
    return taken.masked_fill(columns < 0, False if mask.dtype == torch.bool else _least(mask))


def _least(mask: Tensor) -> float:
    """What is added to the score of a key that is hidden."""
    return torch.finfo(mask.dtype).min


def _room(cache: Any, index: int, rule: Window) -> WindowedLayer:
    """The layer's place in the cache, one that holds no more than is seen."""
    if not isinstance(cache, DynamicCache):
        raise ValueError(
            f"a window takes a DynamicCache or a StaticCache, not a {type(cache).__name__}; pass one, or none"
        )
    while len(cache.layers) <= index:
        cache.layers.append(DynamicLayer())
    layer: Any = cache.layers[index]
    if not isinstance(layer, WindowedLayer):
        if layer.get_seq_length() > 0:
            raise ValueError(f"layer {index} of the given cache was filled by another model; pass an empty cache")
        layer = cache.layers[index] = WindowedLayer(rule.window + rule.sinks)
    return layer


def _at(keys_BKSP: Tensor, places_BS: Tensor) -> Tensor:
    """Each row's keys at its places."""
    n_heads, width = keys_BKSP.shape[1], keys_BKSP.shape[3]
    return keys_BKSP.gather(2, places_BS[:, None, :, None].expand(-1, n_heads, -1, width))
