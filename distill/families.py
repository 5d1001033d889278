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
        rotates: whether an attention layer rotates its queries and keys.
        kv_heads: how many key/value heads, from the config; only asked where they are fused.
        lacks: what a config asks for that the view cannot say, or None.
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
    kv_heads: Callable[[Any], int] = lambda config: config.num_key_value_heads
    lacks: Callable[[Any], str | None] = lambda config: None


def _falcon_kv_heads(config: Any) -> int:
    if config.new_decoder_architecture:
        return int(config.num_kv_heads)
    return 1 if config.multi_query else int(config.num_attention_heads)


def _two_way(config: Any) -> str | None:
    return "attention in both directions" if getattr(config, "use_bidirectional_attention", False) else None


_QK_NORM = ("q_norm", "k_norm")

FAMILIES: dict[str, Family] = {
    "falcon": Family(
        fused="query_key_value",
        grouped=True,
        o="dense",
        kv_heads=_falcon_kv_heads,
        lacks=lambda config: "ALiBi, a bias on the scores" if config.alibi else None,
    ),
    "gemma": Family(lacks=_two_way),
    "gemma2": Family(softcap="attn_logit_softcapping", lacks=_two_way),
    "gemma3_text": Family(norms=_QK_NORM, lacks=_two_way),
    "gpt2": Family(
        fused="c_attn",
        o="c_proj",
        rotates=lambda attention: False,
        kv_heads=lambda config: config.num_attention_heads,
        lacks=lambda config: "cross attention" if config.add_cross_attention else None,
    ),
    "gpt_neox": Family(
        fused="query_key_value", grouped=True, o="dense", kv_heads=lambda config: config.num_attention_heads
    ),
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


def family_name(config: PreTrainedConfig) -> str:
    """The family of a teacher's or student's text decoder."""
    return str(config.get_text_config().model_type).removeprefix("distilled_")


def family_of(config: PreTrainedConfig) -> Family:
    """The row for a teacher's (or student's) config.

    Raises:
        UserError: for a family without a row, or a variant of it that cannot be read.
    """
    name = family_name(config)
    if name not in FAMILIES:
        raise UserError(
            f"the teacher is of the family {config.model_type!r}; supported families are {', '.join(sorted(FAMILIES))}"
        )
    lacks = FAMILIES[name].lacks(config.get_text_config())
    if lacks is not None:
        raise UserError(f"the teacher is a {name} with {lacks}, which no mixer starts from; take another checkpoint")
    return FAMILIES[name]
