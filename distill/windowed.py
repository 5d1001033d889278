"""A teacher that sees no more than a hybrid remembers: the first tokens and the latest ones, in chosen layers.

    V_ts = 1 where query t may see key s in the layer as it is: causal, padding, documents, a window of its own
    r_ts = Σ_{u<s} V_tu        how many keys that t sees stand before s
    n_t  = Σ_u V_tu            how many it sees
    W_ts = V_ts ∧ (r_ts < sinks ∨ n_t − r_ts ≤ window)

is the mask of "Efficient Streaming Language Models with Attention Sinks" (Xiao et al. 2024): the ``sinks`` first
tokens of the document and the last ``window``, the query's own among them. Nothing is trained, so this is what any
student with mixers in the same layers has to beat. All is counted among what a query sees: padding is no sink, and
neither is another document's token. Two things are as we chose:

- Positions stay what they were (rotary by the token's true position, not by its place in the cache): the teacher's
  weights are used as they are, on distances that they know.
- A layer with a window of its own sees nothing that it did not see before; its document's first tokens are sinks for as
  long as that window has not filled up.

A cache holds ``window + sinks`` tokens in such a layer, no more, however long the context (:class:`WindowedLayer`).
"""

import copy
import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from distill.attention import views
from distill.conversion import report
from distill.decoder import attention_of, layers_of
from distill.decoder_inputs import CACHES
from distill.errors import UserError
from distill.layout import mixer_layers
from distill.student import is_student
from distill.vision import read_both_ways

SINKS = 4
IMPLEMENTATIONS = ("eager", "sdpa")
_NOTE = "distill_windowed"
_NOT_AS_IT_WAS = "a window is put into a teacher as it was, not into a student or into a model that has one"


@dataclass(frozen=True)
class Window:
    """What chosen layers see: the ``sinks`` first tokens and the last ``window``."""

    layers: tuple[int, ...]
    window: int
    sinks: int = SINKS

    def __str__(self) -> str:
        return f"window {self.window} + {self.sinks} sink{'' if self.sinks == 1 else 's'}"


def windowed(teacher: PreTrainedModel, layers: Sequence[int], *, window: int, sinks: int = SINKS) -> PreTrainedModel:
    """The same model, with weights shared, whose ``layers`` see the first ``sinks`` tokens and the last ``window``.

    Args:
        teacher: a stock model with attention computed by ``eager`` or ``sdpa``; left untouched.
        layers: 0-based indices.
        window: tokens, the query's own counted; one as long as the text leaves every number as it was.
        sinks: tokens at the beginning of each document; 0 is a plain sliding window.

    Returns:
        A model of the teacher's class, in its mode and dtype; ``window_of`` tells it from its teacher.

    Raises:
        UserError: for a student, layers that are not there, sizes below their least, or another implementation.
    """
    rule = Window(tuple(sorted(set(layers))), window, sinks)
    _require_sound(teacher, rule)
    own = {index: view.sliding_window for index, view in views(teacher, rule.layers).items()}
    # A deep copy that takes every tensor for a copy of itself: other modules and hooks, the same weights.
    shared = {id(tensor): tensor for tensor in (*teacher.parameters(), *teacher.buffers())}
    model = copy.deepcopy(teacher, shared)
    for index in rule.layers:
        attention = attention_of(layers_of(model)[index])
        names = tuple(inspect.signature(attention.forward).parameters)
        see_less = functools.partial(_see_less, index=index, rule=rule, own=own[index], names=names)
        attention.register_forward_pre_hook(see_less, with_kwargs=True)
    model._is_stateful = True  # what has left the window cannot be rolled back to
    model.distill_window = rule  # type: ignore[assignment]
    return model


def matching_window(teacher: PreTrainedModel, student: PreTrainedModel, *, sinks: int = SINKS) -> Window:
    """The window, in the layers where ``student`` has mixers, that remembers as many bytes as those mixers do.

    Args:
        teacher, student: may be without weights, but must have their dtype: a mixer's state is fp32, keys and values
            are as the teacher is.

    Raises:
        UserError: the student has no mixers, or another depth.
    """
    if is_student(teacher):
        raise UserError(_NOT_AS_IT_WAS)
    if not is_student(student) or not mixer_layers(student.config):
        raise UserError("a window like a student's is put where it has mixers, and this model has none")
    depths = [len(layers_of(model)) for model in (teacher, student)]
    if depths[0] != depths[1]:
        raise UserError(f"the teacher has {depths[0]} layers and the student {depths[1]}: it came from another teacher")
    layers, found = mixer_layers(student.config), report(teacher, student)
    per_token = found.teacher_kv_bytes_per_token // depths[0] * len(layers)
    return Window(tuple(layers), max(1, found.state_bytes // per_token - sinks), sinks)


def window_of(model: PreTrainedModel) -> Window | None:
    """What :func:`windowed` was asked for; None for a model that it did not make."""
    return getattr(model, "distill_window", None)


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
    kwargs["attention_mask"] = (
        kept if mask is None or mask.dtype == torch.bool else mask.masked_fill(~kept, _least(mask))
    )
    return (), kwargs


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
        raise ValueError(f"a window takes a DynamicCache, not a {type(cache).__name__}; pass one, or none")
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


def _require_sound(teacher: PreTrainedModel, rule: Window) -> None:
    depth = len(layers_of(teacher))
    outside = [index for index in rule.layers if not 0 <= index < depth]
    if outside or not rule.layers:
        named = ", ".join(map(str, outside)) or "no layer"
        raise UserError(f"a window in {named}: the teacher has {depth} layers, numbered 0 to {depth - 1}; name some")
    if rule.window < 1 or rule.sinks < 0:
        raise UserError(f"window is {rule.window} and sinks {rule.sinks}; they are at least 1 and 0 tokens")
    if is_student(teacher) or window_of(teacher) is not None:
        raise UserError(_NOT_AS_IT_WAS)
    if read_both_ways(teacher.config) is not None:
        raise UserError("this teacher reads images in both directions, which a window of the latest tokens does not")
    used = teacher.config.get_text_config()._attn_implementation
    if used not in IMPLEMENTATIONS:
        allowed = " or ".join(IMPLEMENTATIONS)
        raise UserError(
            f"attention is computed by {used}, which takes no mask of ours; load the teacher with {allowed}"
        )
