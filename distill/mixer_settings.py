"""What mixers are built with: the sizes that all of a student's share, and what is one kind's alone.

A student has mixers of one kind, and may have layers of attention behind a window beside them. All settings lie
together in its config; ``distill.layout.settings_of`` picks those of a kind again.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig

from distill.attention import AttentionView
from distill.decoder import norm_eps
from distill.errors import UserError
from distill.layout import WINDOWED, told_apart
from distill.window import SINKS

WINDOW = 64
TAYLOR_DIM = 16


def state_dim_of(mixer: str, head_dim: int) -> int:
    """The state size of a head where none is asked for: the teacher's head size."""
    return min(head_dim, TAYLOR_DIM) if mixer == "based" else head_dim  # a series has a feature for each two numbers


def shared_settings(
    teacher: PreTrainedConfig, attention: AttentionView, *, expand: int, state_dim: int, conv_width: int, rope: str
) -> dict[str, Any]:
    """What every kind of mixer is built with, in the place of this attention."""
    return {
        "n_heads": attention.n_heads * expand,
        "head_dim": attention.head_dim,
        "state_dim": state_dim,
        "conv_width": conv_width,
        "norm_eps": norm_eps(teacher),
        "out_bias": attention.o.bias is not None,
        "rope": rope,
    }


def own_settings(
    mixer: str,
    kinds: Sequence[str],
    replaced: Mapping[int, AttentionView],
    window: int | None,
    sinks: int | None,
) -> dict[str, Any]:
    """What is not for every kind.

    Args:
        mixer: the kind that is not told apart by layer.
        kinds: one name a layer.
        replaced: the attention that mixers replace, by layer.
        window, sinks: of the layers behind a window; 64 and 4 if None.

    Raises:
        UserError: a window that no layer has, or that is none; layers whose own windows differ.
    """
    behind = {index: view for index, view in replaced.items() if WINDOWED in (mixer, kinds[index])}
    if not behind and (window, sinks) != (None, None):
        raise UserError(f"window and sinks are for {WINDOWED}, not for {mixer}; leave them out, or give window_layers")
    own = _window_settings(_of_one_window(behind, mixer), window, sinks) if behind else {}
    if mixer == "gated_deltanet":  # transformers' has no bias there, so only where the teacher's must go somewhere
        attention = next(iter(replaced.values()))
        own["conv_bias"] = any(part.bias is not None for part in (attention.q, attention.k, attention.v))
    return own


def _of_one_window(behind: Mapping[int, AttentionView], mixer: str) -> AttentionView:
    """The first, whose own window all others must have."""
    windows = {index: view.sliding_window for index, view in behind.items()}
    if len(set(windows.values())) > 1:
        told, odd = told_apart({i: "none" if size is None else f"{size} tokens" for i, size in windows.items()})
        otherwise = "" if mixer == WINDOWED else ", or not in window_layers"
        raise UserError(
            f"the layers to put behind a window have different windows of their own ({told}); put {odd} in"
            f" keep_attention{otherwise}"
        )
    return next(iter(behind.values()))


def _window_settings(attention: AttentionView, window: int | None, sinks: int | None) -> dict[str, Any]:
    window, sinks = WINDOW if window is None else window, SINKS if sinks is None else sinks
    if window < 1 or sinks < 0:
        raise UserError(f"window is {window} and sinks {sinks}; they are at least 1 and 0 tokens")
    own = {"own_window": attention.sliding_window, "n_kv_heads": attention.n_kv_heads}
    return {"window": window, "sinks": sinks, **own}
