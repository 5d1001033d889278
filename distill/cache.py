"""What a mixer remembers between calls, as one layer of an ordinary Hugging Face cache.

A ``DynamicCache`` or ``StaticCache`` made anywhere (by ``generate``, a harness, a user) holds key/value layers
only, since the layout stands under a config key of our own. :func:`adopt` exchanges the layers at the mixers'
places before the decoder runs; everything else about the cache stays the library's.

What is remembered is allocated by the first call and from then on updated where it lies, whatever the length of the
context. Only where gradients are wanted are new tensors made, since autograd needs the old ones.
"""

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, LinearAttentionLayer


class MixerCacheLayer(LinearAttentionLayer):
    """A constant-size cache layer: the last inputs of the convolution (B, K−1, C) and the state of the scan.

    Attributes:
        ends_in_padding: whether the last call of several tokens ended in padding, so that a token behind it would
            make a gap; known from that call, so that later ones need not look.
    """

    def __init__(self) -> None:
        super().__init__(number_of_states=1)
        self.device: torch.device | None  # type: ignore[assignment]
        self.ends_in_padding = False

    def has_past(self) -> bool:
        """Whether tokens were read; a Python value, the same from the second call on, which a compiled step may use."""
        return self.has_previous_state[0]

    def state(self) -> Tensor | None:
        """The scan's state (B, H, P, N) to continue from and to update in place; None before the first token."""
        state_BHPN = self.recurrent_states[0]
        if state_BHPN is None or not self.has_past():
            return None
        self.recurrent_states[0] = state_BHPN = _writable(state_BHPN)
        return state_BHPN

    def replace_state(self, state_BHPN: Tensor) -> None:
        """Take the state after this call."""
        self.recurrent_states[0] = _replaced(self.recurrent_states[0], state_BHPN)
        self.is_recurrent_states_initialized[0] = True
        self.device = state_BHPN.device

    def exchange_inputs(self, x_BTC: Tensor, n_past: int) -> Tensor | None:
        """Take this call's convolution inputs in, give the ``n_past`` inputs before them out (None at the start)."""
        if n_past == 0:
            return None
        held_BTC = self.conv_states[0]
        past_BTC = held_BTC.clone() if held_BTC is not None and self.has_past() else None
        all_BTC = F.pad(x_BTC, (0, 0, n_past, 0)) if past_BTC is None else torch.cat([past_BTC, x_BTC], dim=1)
        self._replace_inputs(all_BTC[:, -n_past:])
        return past_BTC

    def slide_inputs(self, x_B1C: Tensor, valid_B1: Tensor | None) -> Tensor:
        """Take one position's input in, give it out behind the inputs before it: a window (B, K, C), oldest first.

        Padding (False in ``valid_B1``) is not remembered.
        """
        past_BTC = self.conv_states[0]
        assert past_BTC is not None
        window_BKC = torch.cat([past_BTC, x_B1C.to(past_BTC.dtype)], dim=1)
        kept_BTC = window_BKC[:, 1:]
        if valid_B1 is not None:
            kept_BTC = torch.where(valid_B1[..., None], kept_BTC, window_BKC[:, :-1])
        self._replace_inputs(kept_BTC)
        return window_BKC

    def advance(self, n_tokens: int) -> None:
        """All of this call's tokens are in."""
        self.has_previous_state[0] = True

    def reset(self) -> None:
        """Forget. The tensors stay, to be overwritten by the next first call."""
        self.has_previous_state[0] = self.ends_in_padding = False

    def nbytes(self) -> int:
        """Bytes held, the same at every context length."""
        held = (*self.conv_states.values(), *self.recurrent_states.values())
        return sum(state.nbytes for state in held if state is not None)

    def crop(self, tokens_to_remove: int) -> None:
        """A state cannot forget its last tokens; only "remove nothing" is possible."""
        if tokens_to_remove != 0:
            raise ValueError(
                f"cannot remove {abs(tokens_to_remove)} tokens from a state-space state: it does not keep them apart. "
                "Start from an empty cache (assisted decoding is not available for students)."
            )

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_batch(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map_batch(lambda state: state[indices])

    def _map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        for states in (self.conv_states, self.recurrent_states):
            for index, state in states.items():
                if state is not None:
                    states[index] = change(state)

    def _replace_inputs(self, inputs_BTC: Tensor) -> None:
        self.conv_states[0] = _replaced(self.conv_states[0], inputs_BTC)
        self.is_conv_states_initialized[0] = True


class CountingMixerCacheLayer(MixerCacheLayer, CacheLayerMixin):  # type: ignore[override]
    """The first layer of a cache without keys and values: it also counts the tokens.

    The library reads a cache's length off its first attention layer; a student whose every layer is a mixer has none.
    The count is a tensor, as in the library's static layers: a number would make a compiled step stale every time.
    By ``is_initialized`` of such layers PaliGemma tells the call with the prompt from those behind it.
    """

    supports_early_init = True
    cumulative_length: Tensor  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self.cumulative_length = torch.zeros((), dtype=torch.long)
        self.is_initialized = False

    def lazy_initialization(self, *args: object, **kwargs: object) -> None:
        """What is remembered has its shape from the first call."""

    def advance(self, n_tokens: int) -> None:
        count = _writable(self.cumulative_length.to(self.device))
        if not self.has_past():
            _kept_in_place(count.zero_())
        self.cumulative_length = count.add_(n_tokens)
        self.is_initialized = True
        super().advance(n_tokens)

    def reset(self) -> None:
        super().reset()
        self.is_initialized = False

    def get_seq_length(self) -> Tensor | int:  # type: ignore[override]
        return self.cumulative_length if self.has_past() else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Of a mask that no layer reads: as small as it may be."""
        return query_length, 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("a mixer has no keys and values to cache")


class HeadsCacheLayer(MixerCacheLayer, CacheLayerMixin):
    """What a mixer with attention heads beside it remembers: its state, and the keys and values of these heads.

    Keys and values lie in the layer that the cache had there for attention (growing, static, with a window), so that
    lengths and the sizes of masks are what they would be for an attention layer.

    Args:
        attended: that layer, empty.
    """

    supports_early_init = False

    def __init__(self, attended: CacheLayerMixin) -> None:
        super().__init__()
        self.attended: Any = attended

    # The library reads these off a layer, as it does off any that has keys and values.
    keys = property(lambda self: self.attended.keys)
    values = property(lambda self: self.attended.values)
    is_initialized = property(lambda self: self.attended.is_initialized)
    is_sliding = property(lambda self: self.attended.is_sliding)
    is_compileable = property(lambda self: self.attended.is_compileable)
    is_croppable = False

    def lazy_initialization(self, *args: object, **kwargs: object) -> None:
        """Both parts have their shapes from the first call."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """All keys and values that are held, (B, m, S, P), with the new ones."""
        return self.attended.update(key_states, value_states)

    def get_seq_length(self) -> Tensor | int:  # type: ignore[override]
        return self.attended.get_seq_length()

    def get_max_length(self) -> int:
        return self.attended.get_max_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.attended.get_mask_sizes(query_length)

    def reset(self) -> None:
        super().reset()
        self.attended.reset()

    def nbytes(self) -> int:
        """Bytes held: the state, the same at every length, and what the keys and values take."""
        held = (self.attended.keys, self.attended.values)
        return super().nbytes() + sum(tensor.nbytes for tensor in held if tensor is not None)

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        self.attended.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.attended.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.attended.batch_select_indices(indices)

    def offload(self) -> None:
        super().offload()
        self.attended.offload()

    def prefetch(self) -> None:
        super().prefetch()
        self.attended.prefetch()


def adopt(cache: Cache, mixer_layers: Iterable[int], n_layers: int, with_heads: Collection[int] = ()) -> Cache:
    """Put a :class:`MixerCacheLayer` at every mixer's place of ``cache`` (in place) and return it.

    Args:
        cache: of any kind; not yet filled, or filled by this student.
        mixer_layers: where the mixers are.
        n_layers: depth of the student.
        with_heads: which of them have attention heads beside them: there a :class:`HeadsCacheLayer`.

    Raises:
        ValueError: if the cache already holds keys and values there, i.e. it was filled by another model.
    """
    while len(cache.layers) < n_layers:
        cache.layers.append((cache.layer_class_to_replicate or DynamicLayer)())
    places = list(mixer_layers)
    for index in places:
        layer = cache.layers[index]
        if isinstance(layer, MixerCacheLayer):
            continue
        if isinstance(layer, CacheLayerMixin) and layer.get_seq_length() > 0:
            raise ValueError(
                f"layer {index} of the given cache holds the keys and values of another model; "
                "pass an empty cache, or one this student filled"
            )
        if index in with_heads:
            assert isinstance(layer, CacheLayerMixin), f"no place for keys in a {type(layer).__name__}"
            cache.layers[index] = HeadsCacheLayer(layer)
            continue
        counts = index == 0 and len(places) == n_layers and not with_heads
        cache.layers[index] = CountingMixerCacheLayer() if counts else MixerCacheLayer()
    return cache


def cache_nbytes(cache: Cache) -> int:
    """Bytes a cache holds, keys and values of kept attention layers included."""
    total = 0
    for layer in cache.layers:
        if isinstance(layer, MixerCacheLayer):
            total += layer.nbytes()
        elif isinstance(layer, CacheLayerMixin) and layer.keys is not None and layer.values is not None:
            total += layer.keys.nbytes + layer.values.nbytes
    return total


def _writable(state: Tensor) -> Tensor:
    """The tensor itself, or a copy where it may not be written to: outside of the ``inference_mode`` that made it."""
    if torch.compiler.is_compiling():  # cannot ask; what runs compiled is made without inference_mode
        return state
    if state.is_inference() and not torch.is_inference_mode_enabled():
        return _kept_in_place(state.clone())
    return state


def _replaced(old: Tensor | None, new: Tensor) -> Tensor:
    """``new``, written over ``old`` unless there is nothing to write over or autograd needs both."""
    if new.requires_grad:
        return new
    if old is None or old.requires_grad or old.shape != new.shape:
        return _kept_in_place(new.clone())  # ``new`` may be a view of all a prompt's inputs
    return _writable(old).copy_(new)


def _kept_in_place(state: Tensor) -> Tensor:
    """Tell the compiler that this tensor stays where it is; otherwise a CUDA graph would copy it every step."""
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(state)
    return state
