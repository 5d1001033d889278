"""Which decoder layers keep their attention, and which put it behind a window: made into one name a layer.

Layers that keep attention are given as a list, a repeated pattern, a ratio or a count; those with a window as a list.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig

from distill.errors import UserError

ATTENTION = "attention"
WINDOWED = "sliding_window"
OF_WINDOW = ("window", "sinks", "own_window", "n_kv_heads")
"""What only layers of the kind ``WINDOWED`` are built with."""
NAMES = {
    "mamba2": "Mamba-2",
    "discrete_mamba2": "discrete Mamba-2",
    "gated_deltanet": "Gated DeltaNet",
    "based": "BASED",
    "hedgehog": "Hedgehog",
    WINDOWED: "sliding-window attention",
}
"""What people call the kinds of layers that may stand where attention stood."""


def resolve(
    n_layers: int,
    *,
    layers: Sequence[int] | None = None,
    pattern: str | None = None,
    ratio: float | None = None,
    count: int | None = None,
) -> list[int]:
    """The indices of the layers that keep attention, ascending.

    Args:
        n_layers: depth of the teacher.
        layers: the indices themselves, 0-based.
        pattern: ``m`` (mixer) and ``a`` (attention), blanks ignored, repeated over the depth: ``"m m m a"``.
        ratio: share of the layers that keep attention, between 0 and 1, evenly spaced.
        count: number of layers that keep attention, evenly spaced.

    Raises:
        UserError: unless exactly one of the four is given and it fits the depth.
    """
    given = {"layers": layers, "pattern": pattern, "ratio": ratio, "count": count}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise UserError(f"keep_attention takes exactly one of {', '.join(given)}; got {', '.join(named) or 'none'}")
    if layers is not None:
        return _checked(layers, n_layers, "keep_attention")
    if pattern is not None:
        return _from_pattern(pattern, n_layers)
    if ratio is not None:
        if not 0 <= ratio <= 1:
            raise UserError(f"keep_attention.ratio is {ratio}; it is a share of the layers, between 0 and 1")
        count = round(ratio * n_layers)
    assert count is not None
    return evenly_spaced(count, n_layers)


def evenly_spaced(count: int, n_layers: int) -> list[int]:
    """``count`` layers, each the last of its equal share of the depth: 4 of 16 are 3, 7, 11, 15.

    That is where MOHAWK's Llama hybrids keep theirs; the first layers, which gain least from attention, change.
    """
    if not 0 <= count <= n_layers:
        raise UserError(f"keep_attention.count is {count}; the teacher has {n_layers} layers, so 0 to {n_layers}")
    return [(i + 1) * n_layers // count - 1 for i in range(count)]


def layer_kinds(n_layers: int, kept: Sequence[int], mixer: str, windows: Sequence[int] = ()) -> list[str]:
    """One name a layer, ``"attention"`` or a mixer's: what a student's config stores.

    Args:
        kept: the layers that keep attention.
        windows: those with attention behind a window, in a student of another ``mixer``.

    Raises:
        UserError: ``windows`` names layers that are not there, are named twice or keep attention, or leaves none to
            the mixer.
    """
    behind = set(_checked(windows, n_layers, "window_layers"))
    if behind and mixer == WINDOWED:
        raise UserError(f"window_layers is for students of another mixer; all that {mixer} has are such layers")
    if both := sorted(behind & set(kept)):
        raise UserError(
            f"window_layers names layer {', '.join(map(str, both))}, which keeps attention; leave it out of one of them"
        )
    if behind and len(behind) + len(kept) == n_layers:
        raise UserError(f"window_layers leaves no layer to {mixer}; name fewer, or give mixer: {WINDOWED} without them")
    others = [WINDOWED if index in behind else mixer for index in range(n_layers)]
    return [ATTENTION if index in set(kept) else kind for index, kind in enumerate(others)]


def told_apart(of_layers: Mapping[int, str]) -> tuple[str, str]:
    """Layers by what is said of each, and those that are not as most are.

    ``{0: "x", 1: "y", 2: "x"}`` gives ``("layers 0, 2: x; layer 1: y", "layer 1")``.
    """
    groups: dict[str, list[int]] = {}
    for index, text in of_layers.items():
        groups.setdefault(text, []).append(index)
    most = max(groups.values(), key=len)
    told = "; ".join(f"{_named(layers)}: {text}" for text, layers in groups.items())
    return told, _named([index for index in of_layers if index not in most])


def mixer_layers(config: PreTrainedConfig) -> list[int]:
    """Indices of the layers whose attention a mixer replaced."""
    return [index for index, kind in enumerate(config.distill["layers"]) if kind != ATTENTION]


def settings_of(layout: dict[str, Any], kind: str) -> dict[str, Any]:
    """What a mixer of one kind is built with: all kinds share what a layout has, but for what a window needs."""
    own = () if kind == WINDOWED else OF_WINDOW
    return {name: value for name, value in layout["mixer"].items() if name not in own}


def kept_heads(config: PreTrainedConfig) -> dict[int, list[int]]:
    """The query heads that keep attention beside a layer's mixer, by layer; layers without any are left out."""
    return {int(index): list(kept["heads"]) for index, kept in config.distill.get("heads", {}).items()}


def parts_of(layout: dict[str, Any]) -> list[str]:
    """Names of all that a student's layout is put together from: kinds of layers, and ``heads`` where any are kept."""
    return sorted({*layout["layers"], *(["heads"] if layout.get("heads") else [])})


def _named(layers: Sequence[int]) -> str:
    return f"{'layer' if len(layers) == 1 else 'layers'} {', '.join(map(str, layers))}"


def _checked(layers: Sequence[int], n_layers: int, key: str) -> list[int]:
    outside = [index for index in layers if not 0 <= index < n_layers]
    if outside:
        raise UserError(
            f"{key} names layer {', '.join(map(str, outside))}; "
            f"the teacher has {n_layers} layers, numbered 0 to {n_layers - 1}"
        )
    repeated = sorted({index for index in layers if list(layers).count(index) > 1})
    if repeated:
        raise UserError(f"{key} names layer {', '.join(map(str, repeated))} more than once")
    return sorted(layers)


def _from_pattern(pattern: str, n_layers: int) -> list[int]:
    letters = pattern.replace(" ", "")
    if not letters or set(letters) - {"m", "a"}:
        raise UserError(
            f"keep_attention.pattern is {pattern!r}; write m for a mixer and a for attention, as in 'm m m a'"
        )
    if n_layers % len(letters):
        raise UserError(
            f"keep_attention.pattern {pattern!r} has {len(letters)} places, which do not repeat evenly over "
            f"{n_layers} layers; use a length that divides {n_layers}"
        )
    return [index for index in range(n_layers) if letters[index % len(letters)] == "a"]
