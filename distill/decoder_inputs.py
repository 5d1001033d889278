"""What a student does before its decoder runs: find padding and document borders, and make room in the cache.

Mixers need both as they were given; the layers below only see them after the decoder turned them into an attention
mask. So a hook in front of the decoder reads them and passes them on as keyword arguments, which reach every layer.
Where a decoder hands its layers nothing but what it knows itself (Falcon), they are noted on the tensor of positions,
which it hands on as it is: also to a layer that is computed again for its gradients.

In a vision-language model what stands around the decoder (``distill.vision.trunk_of``) may make the mask and the
positions. There a hook in front of the trunk reads them, and leaves what it read for the decoder's.
"""

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_masks_for_generate

from distill.cache import MixerCacheLayer, adopt
from distill.decoder import layers_of
from distill.documents import document_starts, positions_from_index
from distill.vision import is_vision, packed_positions, places, trunk_of


class StepMask(NamedTuple):
    """What ``generate`` passes as mask for one token behind others; no shape in it grows with the context.

    Attributes:
        attention: what attention layers read.
        valid_B1: what mixers read, False where the token is padding; None if no row is padded.
    """

    attention: Any
    valid_B1: Tensor | None


def mask_for_generate(arguments: dict[str, Any]) -> Any:
    """The mask for the next call of a student, from what ``transformers.masking_utils`` makes one of."""
    mask_BT, cache = arguments["attention_mask"], arguments.get("cache", arguments.get("past_key_values"))
    if is_vision(arguments["config"]):  # which makes its masks itself, from what images there are
        return mask_BT
    if not _needs_no_look(arguments["inputs_embeds"].shape[1], _memory(cache)):
        return mask_BT
    return StepMask(create_masks_for_generate(**arguments), None if mask_BT is None else mask_BT[:, -1:].bool())


CACHES = ("past_key_values", "layer_past", "past_key_value")
"""What families call the cache that they hand to attention, where it is not ``cache``."""

LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k")
"""What flash attention reads document borders from, of all rows laid end to end: 0, then where each document ends."""

_NOTE = "distill_sequence"


@dataclass
class Reader:
    """Reads what a student is called with.

    Attributes:
        decoder: the student's.
        mixers: the layers that have one with a state of constant size, ascending.
        with_heads: those of them that have attention heads besides.
        noted: what was read in front of a trunk that is running, for its decoder; None at all other times.
    """

    decoder: Any
    mixers: list[int]
    with_heads: frozenset[int] = frozenset()
    noted: dict[str, Tensor | None] | None = None


def prepare_inputs_of(model: Any, mixers: Mapping[int, nn.Module]) -> None:
    """Let :func:`prepare_sequence` run before every call of the decoder, and :func:`read_as_mixer` before a mixer's.

    Before the trunk of a vision-language model runs :func:`note_sequence`.
    """
    decoder, trunk = model.get_decoder(), trunk_of(model)
    passes_on = all(_passes_keywords_on(type(module).forward) for module in (decoder, *layers_of(model)))
    with_state = {index: mixer for index, mixer in mixers.items() if not mixer.of_attention}
    with_heads = frozenset(index for index, mixer in with_state.items() if mixer.kept_heads)
    reader = Reader(decoder, sorted(with_state), with_heads)
    prepare = functools.partial(prepare_sequence, reader=reader, names=_arguments(decoder), passes_on=passes_on)
    decoder.register_forward_pre_hook(prepare, with_kwargs=True)
    if trunk is not decoder:
        note = functools.partial(note_sequence, reader=reader, names=_arguments(trunk))
        trunk.register_forward_pre_hook(note, with_kwargs=True)
        trunk.register_forward_hook(functools.partial(forget_sequence, reader=reader), always_call=True)
    for mixer in mixers.values():
        mixer.register_forward_pre_hook(read_as_mixer, with_kwargs=True)


def _arguments(module: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(module.forward).parameters)


def read_as_mixer(
    _mixer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Before a mixer runs: what its decoder hands to attention, under the names that mixers know."""
    noted = getattr(kwargs.get("position_ids"), _NOTE, {})
    given = [kwargs[name] for name in CACHES if kwargs.get(name) is not None]
    named = {"cache": given[0]} if given else {}
    # Nothing to say also where something else runs in the place of the mixer's forward (``distill.within``).
    return (args, {**noted, **kwargs, **named}) if noted or named else None


def told(layer: Any, kwargs: dict[str, Any], sequence: dict[str, Tensor | None]) -> dict[str, Any]:
    """The keyword arguments of a decoder layer, with what its mixer needs to know of the sequence."""
    if _passes_keywords_on(type(layer).forward):
        return {**kwargs, **sequence}
    return {**kwargs, "position_ids": _noted(kwargs["position_ids"], sequence)}


def _noted(position_ids: Tensor, sequence: dict[str, Tensor | None]) -> Tensor:
    """The same positions with a note on them; another tensor object, since one may serve several calls."""
    positions = position_ids.view_as(position_ids)
    setattr(positions, _NOTE, sequence)
    return positions


@functools.cache
def _passes_keywords_on(function: Callable[..., Any]) -> bool:
    """Whether what a ``forward`` is given besides its own arguments goes on to what it calls."""
    function = inspect.unwrap(function)
    names = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.VAR_KEYWORD]
    calls = (node for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))))
    passed = [key.value for call in calls if isinstance(call, ast.Call) for key in call.keywords if key.arg is None]
    return any(isinstance(value, ast.Name) and value.id in names for value in passed)


def prepare_sequence(
    _decoder: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    reader: Reader,
    names: tuple[str, ...],
    passes_on: bool,
) -> tuple[tuple[()], dict[str, Any]]:
    """Before the decoder runs: find padding and document borders for the mixers, and make room in the cache.

    Args:
        args, kwargs: what it is called with.
        reader: of the student.
        names: of its arguments, in order.
        passes_on: whether keyword arguments reach its layers' attention.

    Raises:
        ValueError: as ``read_sequence``.
    """
    kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
    sequence = read_sequence(reader, kwargs, names) if reader.noted is None else reader.noted
    if passes_on:
        return (), {**kwargs, **sequence}
    if any(tensor is not None for tensor in sequence.values()):
        tokens = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
        cache = kwargs.get(_cache_name(names))
        positions = _positions(kwargs.get("position_ids"), tokens.shape[1], cache, tokens.device)
        kwargs["position_ids"] = _noted(positions, sequence)
    return (), kwargs


def note_sequence(
    _trunk: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, reader: Reader, names: tuple[str, ...]
) -> tuple[tuple[()], dict[str, Any]]:
    """Before a trunk runs: the same, for the decoder that it will call."""
    kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
    reader.noted = read_sequence(reader, kwargs, names)
    return (), kwargs


def forget_sequence(_trunk: Any, _args: Any, _output: Any, *, reader: Reader) -> None:
    """After a trunk ran, or failed: its decoder may be called by itself again."""
    reader.noted = None


def read_sequence(reader: Reader, kwargs: dict[str, Any], names: tuple[str, ...]) -> dict[str, Tensor | None]:
    """What mixers need to know of a call, by the names they know it under; makes room in the cache.

    Args:
        reader: of the student.
        kwargs: what a decoder or a trunk is called with; changed in place.
        names: of its arguments.

    Raises:
        ValueError: for inputs that some layer would silently mix up: a 4-D mask, padding between tokens, packed
            documents together with a cache or with a padding mask, borders told in two ways that disagree.
    """
    given = [kwargs.pop(name, None) for name in ("cache", "past_key_values")]
    cache = next((cache for cache in given if cache is not None), None)
    tokens = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
    length = tokens.shape[1]

    mask = kwargs.get("attention_mask")
    if isinstance(mask, StepMask):
        kwargs["attention_mask"], valid_BT = mask
    else:
        valid_BT = _valid_positions(mask, length, _memory(cache))
    if (document_BT := _document_numbers(kwargs, tokens)) is not None:
        _tell_by_positions(kwargs, document_BT, valid_BT)
    place_BT = places(kwargs.get("position_ids"))
    resets_BT = None if place_BT is None else document_starts(place_BT, valid_BT)
    if resets_BT is not None:
        _isolate_documents(kwargs, valid_BT, cache)
        kwargs["position_ids"] = packed_positions(reader.decoder.config, kwargs["position_ids"])
        resets_BT = resets_BT.expand(tokens.shape[0], -1)
    kwargs[_cache_name(names)] = cache = _with_room(cache, reader, kwargs.get("use_cache"))
    if length > 1 and (memory := _memory(cache)) is not None:
        memory.ends_in_padding = valid_BT is not None and not bool(valid_BT[:, -1].all())
    return {"valid_BT": valid_BT, "resets_BT": resets_BT}


def _document_numbers(kwargs: dict[str, Any], tokens: Tensor) -> Tensor | None:
    """The number of each token's document, from ``seq_idx`` or from flash attention's lengths; None without either."""
    seq_idx_BT = kwargs.pop("seq_idx", None)
    name = next((name for name in LENGTHS if kwargs.get(name) is not None), None)
    if seq_idx_BT is not None or name is None:
        return seq_idx_BT
    n_rows, length = tokens.shape[:2]
    ends_D = kwargs[name].to(tokens.device)
    rows_B = torch.arange(n_rows + 1, device=tokens.device) * length
    if not bool(torch.isin(rows_B, ends_D).all()):
        raise ValueError(
            f"{name} is {ends_D.tolist()}, which does not cover {n_rows} × {length} tokens or has a document that goes "
            "on in another row. It holds 0 and then where each document ends, rows laid end to end."
        )
    here_BT = torch.arange(n_rows * length, device=tokens.device).view(n_rows, length)
    return torch.searchsorted(ends_D[1:].contiguous(), here_BT, right=True)


def _tell_by_positions(kwargs: dict[str, Any], document_BT: Tensor, valid_BT: Tensor | None) -> None:
    """Let the positions, which attention layers read too, tell where documents begin; one alone needs none."""
    position_BT = positions_from_index(document_BT)
    if kwargs.get("position_ids") is None:
        if document_starts(position_BT) is not None:
            kwargs["position_ids"] = position_BT
        return
    place_BT = places(kwargs["position_ids"])
    told_BT = None if place_BT is None else document_starts(place_BT, valid_BT)
    starts_BT = document_starts(position_BT, valid_BT)
    if starts_BT is not None and (told_BT is None or bool((told_BT != starts_BT).any())):
        raise ValueError(
            "seq_idx or cu_seq_lens say that several documents are packed into a row, and position_ids do not begin "
            "anew where they do: attention layers would see across documents. Leave position_ids out."
        )


def _cache_name(names: tuple[str, ...]) -> str:
    """Its name from transformers 5.24 on, and before."""
    return "cache" if "cache" in names else "past_key_values"


def _positions(position_ids: Tensor | None, length: int, cache: Any, device: torch.device) -> Tensor:
    """As given, or as a decoder counts them."""
    if position_ids is not None:
        return position_ids
    return (torch.arange(length, device=device) + (0 if cache is None else cache.get_seq_length()))[None]


def _memory(cache: Any) -> MixerCacheLayer | None:
    """What the first mixer remembers; None where there is no cache, or no mixer ran with it yet."""
    layers = cache.layers if isinstance(cache, Cache) else ()
    return next((layer for layer in layers if isinstance(layer, MixerCacheLayer)), None)


def _valid_positions(attention_mask: Any, length: int, memory: MixerCacheLayer | None) -> Tensor | None:
    """The last ``length`` columns of a padding mask as booleans; None where nothing is padded."""
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        raise ValueError(
            "attention_mask must be 2-D (batch, tokens) with 1 for tokens and 0 for padding: a mixer cannot follow "
            "an arbitrary 4-D mask. Packed documents are kept apart by position_ids."
        )
    if _needs_no_look(length, memory):
        return attention_mask[:, -1:].bool()
    if bool(attention_mask.all()):
        return None
    _refuse_gaps(attention_mask.bool())
    return attention_mask[:, -length:].bool()


def _needs_no_look(length: int, memory: MixerCacheLayer | None) -> bool:
    """Whether a mask's values may stay unread: for one token behind others, where reading would let a GPU wait.

    Padding is then not remembered, so that it makes no gap, whatever comes behind it.
    """
    return length == 1 and memory is not None and memory.has_past() and not memory.ends_in_padding


def _refuse_gaps(mask_BT: Tensor) -> None:
    """A convolution that skips padding would need to look past it; padding may stand before or behind the tokens."""
    starts_B = F.pad(mask_BT, (1, 0)).int().diff(dim=1).eq(1).sum(dim=1)
    if bool((starts_B > 1).any()):
        raise ValueError(
            "attention_mask has padding between tokens of one sequence; a mixer's convolution cannot skip it. Pad on "
            "the left (or on the right), or run the sequences one by one."
        )


def _isolate_documents(kwargs: dict[str, Any], valid_BT: Tensor | None, cache: Any) -> None:
    """Attention layers keep packed documents apart only without mask and cache; make it so or say why not."""
    if cache is not None:
        raise ValueError(
            "several documents are packed into a row, and a cache was passed: attention layers would see across "
            "documents. Call without a cache, or give one document a row."
        )
    if valid_BT is not None:
        raise ValueError(
            "several documents are packed into a row, and attention_mask has padding: attention layers would see "
            "across documents. Leave attention_mask out (let padding restart the positions instead)."
        )
    kwargs["attention_mask"] = None
    kwargs["use_cache"] = False


def _with_room(cache: Any, reader: Reader, use_cache: bool | None) -> Any:
    """The cache to run with, mixers' layers in their places; a new one where none was given and one is wanted."""
    decoder = reader.decoder
    if use_cache is None:
        use_cache = decoder.config.use_cache
    if cache is None and use_cache and not (decoder.training and decoder.gradient_checkpointing):
        cache = DynamicCache(config=decoder.config)
    if not isinstance(cache, Cache):
        return cache
    return adopt(cache, reader.mixers, decoder.config.num_hidden_layers, reader.with_heads)
