"""One view of every family's attention: the projections, how heads are grouped, how scores are made.

    q, k, v = W_q u + b_q, W_k u + b_k, W_v u + b_v         per head: P of the projections' rows
    q, k    = rotate(norm(q)), rotate(norm(k))              where the family has norms; rotation of all P, some or none
    A       = softmax(mask(cap(scaling · q kᵀ)))            cap(x) = c·tanh(x/c) where the family caps its scores
    out     = W_o (A v) + b_o

Hugging Face names and shapes these a little differently in each family. Everything that needs to know, seeding and the
mixing-matrix stage, goes through :class:`AttentionView`; a new family is a row in ``distill.families.FAMILIES``.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.decoder import attention_of, layers_of
from distill.errors import UserError
from distill.families import FAMILIES, Family, family_name, family_of, found
from distill.objectives import attention_matrix
from distill.projections import Projection, is_linear, out_features, split, whole
from distill.turning import Positions, Rotate, rotation_of, turned
from distill.within import whole_shape

__all__ = ["FAMILIES", "AttentionView", "Family", "Positions", "family_of", "view", "views"]


@dataclass(frozen=True)
class AttentionView:
    """An attention layer read in one vocabulary.

    Shapes: H query heads, K key/value heads, P channels a head (which need not be hidden/H), D hidden size.

    Attributes:
        q, k, v, o: the projections; weights (H·P, D), (K·P, D), (K·P, D), (D, H·P).
        scaling: what scores are multiplied with before the softmax.
        sliding_window: how far back a position sees, or None.
        rotate: applies rotary positions, ``(q_BHTP, k_BKTP, cos, sin) -> (q, k)``, to as many channels as cos has.
        softcap: c of ``c·tanh(scores / c)``, or None.
        rotates: whether the rotation that the decoder hands out is used.
        q_norm, k_norm: norms of queries and keys; over a head's P channels, or over all heads' together.
    """

    q: Projection
    k: Projection
    v: Projection
    o: Projection
    n_heads: int
    n_kv_heads: int
    head_dim: int
    scaling: float
    sliding_window: int | None
    rotate: Rotate
    softcap: float | None = None
    rotates: bool = True
    q_norm: nn.Module | None = None
    k_norm: nn.Module | None = None

    def queries_and_keys(self, hidden_BTD: Tensor, position_embeddings: Positions) -> tuple[Tensor, Tensor]:
        """Rotated queries and keys, keys repeated to the query heads; both (B, H, T, P).

        Args:
            hidden_BTD: what the attention layer reads (after its norm).
            position_embeddings: the (cos, sin) the decoder hands to its layers.
        """
        q_BHTP, k_BKTP = self.queries_and_shared_keys(hidden_BTD, position_embeddings)
        return q_BHTP, self.per_query_head(k_BKTP, dim=1)

    def matrix(self, hidden_BTD: Tensor, position_embeddings: Positions, document_BT: Tensor | None = None) -> Tensor:
        """A, (B, H, T, T): what `attention_matrix` makes of `queries_and_keys`; arguments as theirs."""
        return attention_matrix(
            *self.queries_and_keys(hidden_BTD, position_embeddings),
            scaling=self.scaling,
            document_BT=document_BT,
            window=self.sliding_window,
            softcap=self.softcap,
        )

    def queries_and_shared_keys(self, hidden_BTD: Tensor, position_embeddings: Positions) -> tuple[Tensor, Tensor]:
        """As `queries_and_keys`, with the keys once: (B, H, T, P) and (B, K, T, P)."""
        q_BHTP = self.by_head(self.q(hidden_BTD), self.n_heads, self.q_norm).transpose(1, 2)
        k_BKTP = self.by_head(self.k(hidden_BTD), self.n_kv_heads, self.k_norm).transpose(1, 2)
        return self.turned(q_BHTP, k_BKTP, position_embeddings)

    def turned(self, q_BHTP: Tensor, k_BKTP: Tensor, position_embeddings: Positions) -> tuple[Tensor, Tensor]:
        """Queries and keys, already through their norms, with their positions rotated in."""
        return turned(self.rotate, q_BHTP, k_BKTP, position_embeddings if self.rotates else None)

    def values(self, hidden_BTD: Tensor) -> Tensor:
        """Values repeated to the query heads, (B, T, H, P)."""
        return self.per_query_head(self.by_head(self.v(hidden_BTD), self.n_kv_heads), dim=2)

    def per_query_head(self, heads: Tensor, dim: int) -> Tensor:
        """Repeat key/value heads to query heads: neighbours share one (``repeat_interleave``), as attention does."""
        return heads.repeat_interleave(self.n_heads // self.n_kv_heads, dim=dim)

    def by_head(self, projected_BTC: Tensor, n_heads: int, norm: Any = None) -> Tensor:
        """(B, T, heads·P) to (B, T, heads, P), through the norm."""
        over_all = norm is not None and n_heads > 1 and _last(norm) == n_heads * self.head_dim
        if over_all:
            projected_BTC = norm(projected_BTC)
        by_head_BTHP = projected_BTC.unflatten(-1, (n_heads, self.head_dim))
        return by_head_BTHP if norm is None or over_all else norm(by_head_BTHP)


def views(model: PreTrainedModel, layers: Iterable[int]) -> dict[int, AttentionView]:
    """The attention of the given layers of a stock model, by index.

    Raises:
        UserError: naming the family, the layer and what is missing.
    """
    family, seen = family_of(model.config), {}
    for index in layers:
        try:
            seen[index] = view(attention_of(layers_of(model)[index]), family)
        except UserError as error:
            raise UserError(f"layer {index} of this {family_name(model.config)} cannot be converted: {error}") from None
    return seen


def view(attention: Any, family: Family | None) -> AttentionView:
    """Read ``attention``, what a decoder layer of the given family mixes over time with.

    Args:
        family: its row; None looks for the names.

    Raises:
        UserError: naming what is missing, or is there and not part of a view.
    """
    family = family or found(attention)
    if not hasattr(attention, "config"):
        raise UserError(f"{type(attention).__name__} has no config to read its heads from")
    names = (family.fused, family.o) if family.fused else (family.q, family.k, family.v, family.o)
    missing = [name for name in names if not is_linear(getattr(attention, name, None))]
    if missing:
        raise UserError(f"{type(attention).__name__} has no linear {', '.join(missing)}")
    read = (*names, *(family.norms or ()))
    unread = [name for name, _ in attention.named_parameters() if name.split(".")[0] not in read]
    if unread:
        raise UserError(f"{type(attention).__name__} also has {', '.join(unread)}, which is no part of any view")
    head_dim = _head_dim(attention)
    if family.fused:
        fused, n_heads = getattr(attention, family.fused), int(attention.config.num_attention_heads)
        n_kv_heads = (out_features(fused) // head_dim - n_heads) // 2
        if n_kv_heads < 1 or n_heads % n_kv_heads or out_features(fused) != (n_heads + 2 * n_kv_heads) * head_dim:
            raise UserError(
                f"{family.fused} is {out_features(fused)} wide, which is not {n_heads} heads of {head_dim}"
                " for queries and as many heads for keys as for values"
            )
        q, k, v = split(fused, n_heads, n_kv_heads, head_dim, grouped=family.grouped)
    else:
        q, k, v = (getattr(attention, name) for name in (family.q, family.k, family.v))
        n_heads, n_kv_heads = (out_features(projection) // head_dim for projection in (q, k))
    q_norm, k_norm = (getattr(attention, name, None) for name in family.norms or ("", ""))
    return AttentionView(
        q=q,
        k=k,
        v=v,
        o=whole(getattr(attention, family.o)),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        scaling=float(getattr(attention, "scaling", head_dim**-0.5)),
        sliding_window=_sliding_window(attention),
        rotate=rotation_of(attention),
        softcap=getattr(attention, family.softcap) if family.softcap else None,
        rotates=family.rotates(attention),
        q_norm=q_norm,
        k_norm=k_norm,
    )


def rotated_channels(attention: Any) -> int:
    """How many of a head's channels the decoder's cos and sin are for; a mixer, which reads none, takes any."""
    rope = getattr(getattr(attention, "config", None), "rope_parameters", None) or {}
    return int(_head_dim(attention) * rope.get("partial_rotary_factor", 1.0))


def _head_dim(attention: Any) -> int:
    for name in ("head_dim", "head_size"):
        if hasattr(attention, name):
            return int(getattr(attention, name))
    return int(attention.config.hidden_size // attention.config.num_attention_heads)


def _sliding_window(attention: Any) -> int | None:
    """Per layer where the family says so (Qwen2 mixes both kinds), else from the config (Mistral)."""
    kinds, index = getattr(attention.config, "layer_types", None), getattr(attention, "layer_idx", None)
    if kinds and index is not None and kinds[index] != "sliding_attention":
        return None
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window
    return getattr(attention.config, "sliding_window", None)


def _last(norm: Any) -> int:
    """Over how many channels a norm takes its mean; 0 for one without weights, which goes head by head."""
    weight = getattr(norm, "weight", None)
    return 0 if weight is None else int(whole_shape(weight)[-1])
