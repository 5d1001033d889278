"""What is particular about each family's attention, a row a family; the defaults are Llama's.

A family is a ``model_type`` of the text decoder. ``distill.attention`` reads a layer as its row says, and tries on a
few tokens that the reading is right before anything is converted.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from distill.errors import UserError


@dataclass(frozen=True)
class Family:
    """Where a family of models keeps what conversion needs.

    Attributes:
        q, k, v: names of the projections inside attention, where they are apart.
        o: name of the output projection.
        fused: name of the projection that holds q, k and v, where they are not.
        grouped: in it each key/value head stands behind its query heads; else all queries come first.
        norms: names of the norms of queries and keys; what an attention layer has not, is not applied.
        softcap: name, inside attention, of what caps the scores.
        rotates: whether an attention layer uses the rotation that its decoder hands it.
    """

    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    o: str = "o_proj"
    fused: str | None = None
    grouped: bool = False
    norms: tuple[str, str] | None = None
    softcap: str | None = None
    rotates: Callable[[Any], bool] = lambda attention: True


_QK_NORM = ("q_norm", "k_norm")

FAMILIES: dict[str, Family] = {
    "cohere2": Family(rotates=lambda attention: attention.sliding_window is not None),
    "exaone4": Family(
        norms=_QK_NORM, rotates=lambda attention: attention.sliding_window is None or attention.is_sliding
    ),
    "falcon": Family(fused="query_key_value", grouped=True, o="dense"),
    "gemma": Family(),
    "gemma2": Family(softcap="attn_logit_softcapping"),
    "gemma3_text": Family(norms=_QK_NORM),
    "gpt2": Family(fused="c_attn", o="c_proj"),
    "gpt_neox": Family(fused="query_key_value", grouped=True, o="dense"),
    "granite": Family(),
    "llama": Family(),
    "mistral": Family(),
    "mixtral": Family(),
    "olmo2": Family(norms=_QK_NORM),
    "phi": Family(o="dense", norms=("q_layernorm", "k_layernorm")),
    "phi3": Family(fused="qkv_proj"),
    "qwen2": Family(),
    "qwen3": Family(norms=_QK_NORM),
    "qwen3_moe": Family(norms=_QK_NORM),
    "smollm3": Family(rotates=lambda attention: bool(attention.use_rope)),
    "starcoder2": Family(),
}

# What other families call the same; the first name that an attention layer has is taken.
_APART = {
    "q": ("q_proj", "query", "wq"),
    "k": ("k_proj", "key", "wk"),
    "v": ("v_proj", "value", "wv"),
    "o": ("o_proj", "out_proj", "dense", "c_proj", "wo"),
}
_FUSED = {"qkv_proj": False, "c_attn": True, "query_key_value": True}
_NORMS = (("q_norm", "k_norm"), ("q_layernorm", "k_layernorm"))
_SOFTCAPS = ("attn_logit_softcapping",)

LAYER_TYPES = ("full_attention", "sliding_attention")


def family_name(config: PreTrainedConfig) -> str:
    """The family of a teacher's or student's text decoder."""
    return str(config.get_text_config().model_type).removeprefix("distilled_")


def family_of(config: PreTrainedConfig) -> Family | None:
    """The row for a teacher's (or student's) config; None where there is none, so that names have to be looked for.

    Raises:
        UserError: for a config that asks for what no view can say.
    """
    name, text = family_name(config), config.get_text_config()
    if (lacking := _beyond_any_view(text)) is not None:
        raise UserError(f"this {name} has {lacking}, which a mixer cannot start from; take another checkpoint")
    return FAMILIES.get(name)


def found(attention: Any) -> Family:
    """A row for an attention layer of an unknown family: its names, as far as they are among those of others."""

    def has(name: str) -> bool:
        return getattr(attention, name, None) is not None

    fused = next((name for name in _FUSED if has(name)), None)
    names = {part: next((name for name in known if has(name)), known[0]) for part, known in _APART.items()}
    return Family(
        **names,
        fused=None if has(names["q"]) else fused,
        grouped=fused is not None and _FUSED[fused],
        norms=next((pair for pair in _NORMS if has(pair[0])), None),
        softcap=next((name for name in _SOFTCAPS if has(name)), None),
        rotates=lambda attention: bool(getattr(attention, "use_rope", True)),
    )


def _beyond_any_view(config: Any) -> str | None:
    """What a text config asks for that is neither projections, norms, rotation, window nor cap."""
    unknown = set(getattr(config, "layer_types", None) or ()) - set(LAYER_TYPES)
    if getattr(config, "alibi", False) or getattr(getattr(config, "attn_config", None), "alibi", False):
        return "ALiBi, a bias on the scores"
    if getattr(config, "add_cross_attention", False) or getattr(config, "is_encoder_decoder", False):
        return "cross attention"
    if getattr(config, "use_bidirectional_attention", False):
        return "attention in both directions"
    return f"layers of the kind {', '.join(sorted(unknown))}" if unknown else None
