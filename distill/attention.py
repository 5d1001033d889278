"""One view of every family's attention: the projections, how heads are grouped, how scores are made.

Hugging Face names and shapes attention a little differently in each family. Everything that needs to know, seeding
and the mixing-matrix stage, goes through :class:`AttentionView`; a new family is a row in :data:`FAMILIES`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import (
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2ForCausalLM,
)
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from distill.errors import UserError


@dataclass(frozen=True)
class Family:
    """Where a family of models keeps what conversion needs.

    Attributes:
        causal_lm: the stock class; a student is a subclass of it.
        q, k, v, o: names of the projections inside ``self_attn``.
        rotate: applies rotary positions, ``(q_BHTP, k_BKTP, cos, sin) -> (q, k)``.
    """

    causal_lm: type[PreTrainedModel]
    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    o: str = "o_proj"
    rotate: Callable[..., tuple[Tensor, Tensor]] = apply_rotary_pos_emb


FAMILIES: dict[str, Family] = {
    "llama": Family(LlamaForCausalLM),
    "mistral": Family(MistralForCausalLM),
    "qwen2": Family(Qwen2ForCausalLM),
}


def family_of(config: PreTrainedConfig) -> Family:
    """The row for a teacher's (or student's) config.

    Raises:
        UserError: for a family without a row.
    """
    name = config.model_type.removeprefix("distilled_")
    if name not in FAMILIES:
        raise UserError(
            f"the teacher is of the family {config.model_type!r}; supported families are {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[name]


@dataclass(frozen=True)
class AttentionView:
    """An attention layer read in one vocabulary.

    Shapes: H query heads, K key/value heads, P channels a head (which need not be hidden/H), D hidden size.

    Attributes:
        q, k, v, o: the projections; weights (H·P, D), (K·P, D), (K·P, D), (D, H·P).
        scaling: what scores are multiplied with before the softmax.
        sliding_window: how far back a position sees, or None.
    """

    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    o: nn.Linear
    n_heads: int
    n_kv_heads: int
    head_dim: int
    scaling: float
    sliding_window: int | None
    rotate: Callable[..., tuple[Tensor, Tensor]]

    def queries_and_keys(self, hidden_BTD: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Rotated queries and keys, keys repeated to the query heads; both (B, H, T, P).

        Args:
            hidden_BTD: what the attention layer reads (after its norm).
            position_embeddings: the (cos, sin) the decoder hands to its layers.
        """
        q_BHTP, k_BKTP = self.queries_and_shared_keys(hidden_BTD, position_embeddings)
        return q_BHTP, self.per_query_head(k_BKTP, dim=1)

    def queries_and_shared_keys(
        self, hidden_BTD: Tensor, position_embeddings: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """As `queries_and_keys`, with the keys once: (B, H, T, P) and (B, K, T, P)."""
        q_BHTP = self.q(hidden_BTD).unflatten(-1, (self.n_heads, self.head_dim)).transpose(1, 2)
        k_BKTP = self.k(hidden_BTD).unflatten(-1, (self.n_kv_heads, self.head_dim)).transpose(1, 2)
        return self.rotate(q_BHTP, k_BKTP, *position_embeddings)

    def values(self, hidden_BTD: Tensor) -> Tensor:
        """Values repeated to the query heads, (B, T, H, P)."""
        v_BTKP = self.v(hidden_BTD).unflatten(-1, (self.n_kv_heads, self.head_dim))
        return self.per_query_head(v_BTKP, dim=2)

    def per_query_head(self, heads: Tensor, dim: int) -> Tensor:
        """Repeat key/value heads to query heads: neighbours share one (``repeat_interleave``), as attention does."""
        return heads.repeat_interleave(self.n_heads // self.n_kv_heads, dim=dim)


def view(attention: Any, family: Family) -> AttentionView:
    """Read ``attention``, a decoder layer's ``self_attn`` of the given family.

    Raises:
        UserError: naming the projections that are missing, where the layer is not built as its family's row says.
    """
    names = {name: getattr(family, name) for name in ("q", "k", "v", "o")}
    missing = [name for name in names.values() if not isinstance(getattr(attention, name, None), nn.Linear)]
    if missing:
        raise UserError(f"{type(attention).__name__} has no linear {', '.join(missing)}: it cannot be converted")
    projections: dict[str, Any] = {key: getattr(attention, name) for key, name in names.items()}
    head_dim = int(attention.head_dim)
    return AttentionView(
        **projections,
        n_heads=projections["q"].out_features // head_dim,
        n_kv_heads=projections["k"].out_features // head_dim,
        head_dim=head_dim,
        scaling=float(attention.scaling),
        sliding_window=_sliding_window(attention),
        rotate=family.rotate,
    )


def _sliding_window(attention: Any) -> int | None:
    """Per layer where the family says so (Qwen2 mixes both kinds), else from the config (Mistral)."""
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window
    return getattr(attention.config, "sliding_window", None)
