"""What a mixer remembers between calls, as one layer of an ordinary Hugging Face cache.

A ``DynamicCache`` or ``StaticCache`` made anywhere (by ``generate``, a harness, a user) holds key/value layers
only, since the layout stands under a config key of our own. :func:`adopt` exchanges the layers at the mixers'
places before the decoder runs; everything else about the cache stays the library's.
"""

from collections.abc import Callable, Iterable

from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, LinearAttentionLayer


class MixerCacheLayer(LinearAttentionLayer, CacheLayerMixin):  # type: ignore[override]
    """A constant-size cache layer: the last inputs of the convolution, the state of the scan, and a token count.

    The count is what the library's own recurrent layer lacks: without it a model whose every layer is a mixer
    cannot tell ``generate`` how far it has read.
    """

    def __init__(self) -> None:
        super().__init__(number_of_states=1)
        self.n_tokens = 0

    def state(self) -> Tensor | None:
        """The scan's state (B, H, P, N) to continue from and to update in place; None before the first token."""
        return self.recurrent_states[0] if self.n_tokens else None

    def exchange_inputs(self, x_BTC: Tensor, n_past: int) -> Tensor | None:
        """Take this call's convolution inputs in, give the ``n_past`` inputs before them out."""
        if n_past == 0:
            return None
        all_BCT = self.update_conv_state(x_BTC.mT, conv_kernel_size=n_past)
        past_BCT = all_BCT[..., : all_BCT.shape[-1] - x_BTC.shape[1]]
        return F.pad(past_BCT, (n_past - past_BCT.shape[-1], 0)).mT

    def advance(self, n_tokens: int) -> None:
        self.n_tokens += n_tokens

    def nbytes(self) -> int:
        """Bytes held, the same at every context length."""
        held = (*self.conv_states.values(), *self.recurrent_states.values())
        return sum(state.nbytes for state in held if state is not None)

    def get_seq_length(self) -> int:
        return self.n_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.n_tokens + query_length, 0

    def reset(self) -> None:
        super().reset()
        self.n_tokens = 0

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

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("a mixer has no keys and values to cache")

    def _map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        for states in (self.conv_states, self.recurrent_states):
            for index, state in states.items():
                if state is not None:
                    states[index] = change(state)


def adopt(cache: Cache, mixer_layers: Iterable[int]) -> Cache:
    """Put a :class:`MixerCacheLayer` at every mixer's place of ``cache`` (in place) and return it.

    Raises:
        ValueError: if the cache already holds keys and values there, i.e. it was filled by another model.
    """
    for index in mixer_layers:
        while len(cache.layers) <= index:
            cache.layers.append((cache.layer_class_to_replicate or DynamicLayer)())
        layer = cache.layers[index]
        if isinstance(layer, MixerCacheLayer):
            continue
        if isinstance(layer, CacheLayerMixin) and layer.get_seq_length() > 0:
            raise ValueError(
                f"layer {index} of the given cache holds the keys and values of another model; "
                "pass an empty cache, or one this student filled"
            )
        cache.layers[index] = MixerCacheLayer()
    return cache


def cache_nbytes(cache: DynamicCache) -> int:
    """Bytes a cache holds, keys and values of kept attention layers included."""
    total = 0
    for layer in cache.layers:
        if isinstance(layer, MixerCacheLayer):
            total += layer.nbytes()
        elif isinstance(layer, CacheLayerMixin) and layer.keys is not None and layer.values is not None:
            total += layer.keys.nbytes + layer.values.nbytes
    return total
