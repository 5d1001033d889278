"""Single attention heads beside a mixer: the few that look something up keep their softmax.

========  =============================================================================
symbol    meaning
========  =============================================================================
u         hidden state that enters the layer (D numbers)
H, K, P   the teacher's query heads, key/value heads, channels a head
n, m      query heads that are kept, and key/value heads that these read
========  =============================================================================

::

    q, k, v  = W_q u + b_q, W_k u + b_k, W_v u + b_v      of the teacher's rows those of these heads: n·P, m·P, m·P
    q, k     = rotate(norm(q)), rotate(norm(k))           as the teacher does
    A        = softmax(mask(cap(scaling · q kᵀ)))         cap(x) = c·tanh(x/c) where the family caps its scores
    out      = mixer(u) + W_o (A v)                       of the teacher's columns those of these heads

The mixer beside them has all H heads, as in any other layer: what is written about a mixer, its seeding, its scan, its
matrix, does not know of kept heads. Its columns of the output projection that belong to kept heads start at zero, so
that each kept head starts as the teacher's; they may learn. What it costs is n of the mixer's H heads of state.

The cache holds the keys and values of m heads, and the mixer's state.

Source: keeping heads by what they retrieve, arXiv 2602.11374.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.cache import HeadsCacheLayer
from distill.mixers.face import cache_layer
from distill.mixers.parts import between_tokens, split_heads
from distill.ssd.factors import MatrixFactors
from distill.turning import Positions, rotation_of, turned
from distill.visible import visible
from distill.within import within


class KeptHeads(nn.Module):
    """Some of the heads of an attention layer, with projections of their own size.

    Args:
        attention: the layer's, whose family's rotation and norms are used; none of it becomes a part of this.
        heads: which query heads, ascending.
        n_heads, n_kv_heads, head_dim: H, K, P of the attention.
        hidden_size: D.
        scaling: what scores are multiplied with.
        window: a query sees itself and the ``window - 1`` tokens before it; None for all.
        softcap: c of ``c·tanh(scores / c)``, or None.
        rotates: whether queries and keys are turned by what the decoder hands out.
        norms: names of the attention's norms of queries and keys, each over a head's channels; none for no norms.
        biased: which of q, k and v have a bias. The output projection's is the mixer's.

    Attributes:
        reads: for each kept query head the place of its key/value head among those that are held.
    """

    def __init__(
        self,
        attention: nn.Module,
        *,
        heads: Sequence[int],
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        hidden_size: int,
        scaling: float,
        window: int | None = None,
        softcap: float | None = None,
        rotates: bool = True,
        norms: Sequence[str] = (),
        biased: Sequence[str] = (),
    ) -> None:
        super().__init__()
        shared = kv_heads(heads, n_heads, n_kv_heads)
        self.heads, self.kv_heads = list(heads), sorted(set(shared))
        self.reads = [self.kv_heads.index(head) for head in shared]
        self.head_dim, self.scaling, self.window, self.softcap = head_dim, scaling, window, softcap
        self.rotates, self.rotate = rotates, rotation_of(attention)
        wide, narrow = len(self.heads) * head_dim, len(self.kv_heads) * head_dim
        self.q_proj = nn.Linear(hidden_size, wide, bias="q" in biased)
        self.k_proj = nn.Linear(hidden_size, narrow, bias="k" in biased)
        self.v_proj = nn.Linear(hidden_size, narrow, bias="v" in biased)
        self.o_proj = nn.Linear(wide, hidden_size, bias=False)
        normed = [copy.deepcopy(getattr(attention, name)) for name in norms] or [None, None]
        self.q_norm: nn.Module | None = normed[0]
        self.k_norm: nn.Module | None = normed[1]

    def forward(self, hidden_BTD: Tensor, **sequence: Any) -> Tensor:
        """What these heads add to the stream, (B, T, D); arguments as :meth:`head_outputs`."""
        return self.o_proj(self.head_outputs(hidden_BTD, **sequence))

    def head_outputs(
        self,
        hidden_BTD: Tensor,
        *,
        attention_mask: Tensor | None = None,
        memory: HeadsCacheLayer | None = None,
        valid_BT: Tensor | None = None,
        resets_BT: Tensor | None = None,
        position_embeddings: Positions = None,
    ) -> Tensor:
        """(B, T, n·P): the weighted sums of values, before the output projection.

        Args:
            attention_mask: as the decoder makes it; without one, padding, documents and the window say what is seen.
            memory: this layer's place in the cache; brought up to date.
            valid_BT: False at padding.
            resets_BT: True where a packed document begins.
            position_embeddings: (cos, sin) as the decoder hands them to attention.

        Raises:
            ValueError: a mask that is neither 2-D nor 4-D.
        """
        q_BnTP, k_BmSP = self._queries_and_keys(hidden_BTD, position_embeddings)
        v_BmSP = split_heads(self.v_proj(hidden_BTD), len(self.kv_heads)).transpose(1, 2)
        if attention_mask is not None and attention_mask.ndim == 4:
            seen = _as_bool(attention_mask)
        elif attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(f"kept heads take an attention mask of 2 or 4 dimensions, not of {attention_mask.ndim}")
        elif memory is not None:
            seen = _seen_behind(memory, hidden_BTD, self.window, attention_mask)
        else:
            seen = visible(hidden_BTD, valid_BT, resets_BT, window=self.window)
        if memory is not None:
            k_BmSP, v_BmSP = memory.update(k_BmSP, v_BmSP)
        k_BnSP, v_BnSP = k_BmSP[:, self.reads], v_BmSP[:, self.reads]
        if self.softcap is None:
            y_BnTP = F.scaled_dot_product_attention(q_BnTP, k_BnSP, v_BnSP, attn_mask=seen, scale=self.scaling)
        else:
            y_BnTP = self._weights(q_BnTP, k_BnSP, seen).to(v_BnSP.dtype) @ v_BnSP
        return y_BnTP.transpose(1, 2).flatten(2)

    def matrix(
        self,
        hidden_BTD: Tensor,
        *,
        valid_BT: Tensor | None = None,
        resets_BT: Tensor | None = None,
        position_embeddings: Positions = None,
    ) -> Tensor:
        """A, (B, n, T, T), at least fp32; zeros at padding, which attention lets read itself."""
        q_BnTP, k_BmTP = self._queries_and_keys(hidden_BTD, position_embeddings)
        seen = visible(hidden_BTD, valid_BT, resets_BT, window=self.window)
        return between_tokens(self._weights(q_BnTP, k_BmTP[:, self.reads], seen), valid_BT)

    def _queries_and_keys(self, hidden_BTD: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """(B, n, T, P) and (B, m, T, P), through their norms, with positions rotated in."""
        q_BTnP = split_heads(self.q_proj(hidden_BTD), len(self.heads))
        k_BTmP = split_heads(self.k_proj(hidden_BTD), len(self.kv_heads))
        if self.q_norm is not None and self.k_norm is not None:
            q_BTnP, k_BTmP = self.q_norm(q_BTnP), self.k_norm(k_BTmP)
        return turned(self.rotate, q_BTnP.transpose(1, 2), k_BTmP.transpose(1, 2), positions if self.rotates else None)

    def _weights(self, q_BnTP: Tensor, k_BnSP: Tensor, seen: Tensor) -> Tensor:
        """A, at least fp32, also under autocast."""
        with torch.autocast(q_BnTP.device.type, enabled=False):
            wide = torch.promote_types(q_BnTP.dtype, torch.float32)
            scores_BnTS = self.scaling * q_BnTP.to(wide) @ k_BnSP.to(wide).mT
            if self.softcap is not None:
                scores_BnTS = self.softcap * torch.tanh(scores_BnTS / self.softcap)
            return scores_BnTS.masked_fill(~seen, torch.finfo(wide).min).softmax(dim=-1)


def _seen_behind(memory: HeadsCacheLayer, hidden_BTD: Tensor, window: int | None, mask_BS: Tensor | None) -> Tensor:
    """(B or 1, 1, T, S) bool: what the next tokens see of the keys that the cache will give back with theirs.

    Args:
        memory: before these tokens are in it.
        hidden_BTD: of these tokens.
        window: a query sees itself and the ``window - 1`` tokens before it; None for all.
        mask_BS: False at padding; None where there is none.
    """
    length, device = hidden_BTD.shape[1], hidden_BTD.device
    n_keys, first = memory.get_mask_sizes(length)
    query_T = memory.get_seq_length() + torch.arange(length, device=device)
    back_TS = query_T[:, None] - (first + torch.arange(n_keys, device=device))
    seen_TS = back_TS >= 0 if window is None else (back_TS >= 0) & (back_TS < window)
    return seen_TS[None, None] if mask_BS is None else seen_TS & mask_BS[:, None, None, first:][..., :n_keys].bool()


class HeadHybrid(nn.Module):
    """A mixer and kept attention heads, with the call signature of an attention layer.

    It has all of the ``Mixer`` protocol; what of that is no matter of heads is the mixer's.

    Args:
        mixer: of any class in ``MIXERS``.
        attention: the layer's, which both replace.
        kept: what ``KeptHeads`` is built with besides.

    Attributes:
        kept_heads: which query heads; all are the mixer's too, and these count for nothing when it is matched alone.
        other_heads: the rest.
    """

    of_attention = False

    def __init__(self, mixer: Any, attention: nn.Module, **kept: Any) -> None:
        super().__init__()
        sizes = {"n_heads": mixer.n_heads, "head_dim": mixer.head_dim, "hidden_size": mixer.out_proj.out_features}
        self.mixer, self.kept = mixer, KeptHeads(attention, **sizes, **kept)
        self.kept_heads = self.kept.heads
        self.other_heads = [head for head in range(mixer.n_heads) if head not in self.kept_heads]

    @property
    def n_heads(self) -> int:
        """H."""
        return self.mixer.n_heads

    @property
    def head_dim(self) -> int:
        """P."""
        return self.mixer.head_dim

    @property
    def in_proj(self) -> nn.Linear:
        """The mixer's."""
        return self.mixer.in_proj

    @property
    def out_proj(self) -> nn.Linear:
        """The mixer's."""
        return self.mixer.out_proj

    @property
    def without_factors(self) -> str | None:
        """Why the mixer's matrix has none."""
        return self.mixer.without_factors

    @property
    def projections_frozen(self) -> bool:
        """Of the mixer; kept heads have the teacher's projections, and nothing to freeze them for."""
        return self.mixer.projections_frozen

    @projections_frozen.setter
    def projections_frozen(self, frozen: bool) -> None:
        self.mixer.projections_frozen = frozen

    def forward(
        self,
        hidden_states: Tensor,
        *,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        valid_BT: Tensor | None = None,
        resets_BT: Tensor | None = None,
        position_embeddings: Positions = None,
        **_attention_only: Any,
    ) -> tuple[Tensor, None]:
        """Mix and attend. Shapes (B, T, D) to (B, T, D); the second result stands for attention weights.

        Args:
            attention_mask: as the decoder makes it for attention in this layer.
            cache: a Hugging Face cache whose layer here is a ``HeadsCacheLayer``; updated in place.
            past_key_values: the same, under the name transformers gave it before 5.24.
            valid_BT: False at padding.
            resets_BT: True where a packed document begins.
            position_embeddings: (cos, sin) as the decoder hands them to attention.
        """
        cache = past_key_values if cache is None else cache
        sequence = {"valid_BT": valid_BT, "resets_BT": resets_BT, "position_embeddings": position_embeddings}
        mixed_BTD, _ = self.mixer(hidden_states, cache=cache, **sequence)
        memory = cache_layer(cache, self.mixer.layer_idx)
        assert memory is None or isinstance(memory, HeadsCacheLayer), f"no room for keys in a {type(memory).__name__}"
        return mixed_BTD + self.kept(hidden_states, attention_mask=attention_mask, memory=memory, **sequence), None

    def mixing_matrix(self, hidden_BTD: Tensor, **sequence: Any) -> Tensor:
        """(B, H, T, T): the mixer's, and attention's where a head is kept."""
        matrix_BHTT = within(self.mixer, self.mixer.mixing_matrix, hidden_BTD, **sequence)
        kept_BnTT = self.kept.matrix(hidden_BTD, **sequence).to(matrix_BHTT.dtype)
        return matrix_BHTT.index_copy(1, self._places(matrix_BHTT), kept_BnTT)

    def matrix_factors(self, hidden_BTD: Tensor, **sequence: Any) -> MatrixFactors:
        """Of the other heads alone, in the order of ``other_heads``: kept ones have a matrix already.

        To be called within the mixer (``distill.within``): some factors are weights of it.
        """
        return self.mixer.matrix_factors(hidden_BTD, **sequence).of_heads(self.other_heads)

    def matrix_parameters(self) -> list[nn.Parameter]:
        """The mixer's: kept heads have their matrix."""
        return self.mixer.matrix_parameters()

    def state_bytes(self, dtype: torch.dtype) -> int:
        """Bytes remembered per sequence by the mixer: kept heads' keys and values grow with the context."""
        return self.mixer.state_bytes(dtype)

    def head_outputs(self, hidden_BTD: Tensor, **sequence: Any) -> Tensor:
        """(B, T, H·P): what the output projection of attention would read: kept heads', and the mixer's of the rest."""
        heads_BTI = within(self.mixer, self.mixer.head_outputs, hidden_BTD, **sequence)
        heads_BTHP = split_heads(heads_BTI, self.mixer.n_heads)
        kept_BTnP = split_heads(self.kept.head_outputs(hidden_BTD, **sequence), len(self.kept_heads))
        return heads_BTHP.index_copy(2, self._places(heads_BTHP), kept_BTnP.to(heads_BTHP.dtype)).flatten(2)

    def _places(self, like: Tensor) -> Tensor:
        return torch.tensor(self.kept_heads, device=like.device)


def kv_heads(heads: Sequence[int], n_heads: int, n_kv_heads: int) -> list[int]:
    """Which key/value head each query head reads: neighbours share one."""
    return [head * n_kv_heads // n_heads for head in heads]


def kept_numel_per_token(layout: dict[str, Any]) -> int:
    """Numbers that a token adds to the cache: keys and values of the heads that a student's layout keeps."""
    n_heads, head_dim = layout["mixer"]["n_heads"], layout["mixer"]["head_dim"]
    held = (len(set(kv_heads(one["heads"], n_heads, one["n_kv_heads"]))) for one in layout.get("heads", {}).values())
    return 2 * head_dim * sum(held)


def _as_bool(mask: Tensor) -> Tensor:
    """What an additive mask shows; a row that shows nothing, of padding, shows all, as softmax takes it."""
    if mask.dtype == torch.bool:
        return mask
    seen = mask > torch.finfo(mask.dtype).min / 2
    return seen | ~seen.any(dim=-1, keepdim=True)
