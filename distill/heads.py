"""Which attention heads stay beside a layer's mixer: checked against the teacher, described for the config, filled.

Heads are query heads, numbered from 0. What is kept of a layer are these heads' rows of its projection of queries, the
rows of the key/value heads that they read, and their columns of the output projection (`distill.mixers.kept_heads`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.attention import AttentionView
from distill.decoder import attention_of, layers_of
from distill.errors import UserError
from distill.families import family_of, found
from distill.layout import ATTENTION
from distill.mixers import MIXERS
from distill.mixers.kept_heads import HeadHybrid
from distill.within import whole_shape

Heads = Mapping[int, Sequence[int]]
"""Query heads by layer."""


def read_heads(text: str) -> dict[int, list[int]]:
    """Heads by layer as a command line has them, ``3:0+2,5:1``; none for an empty text.

    Raises:
        UserError: it is not spelled so.
    """
    chosen: dict[int, list[int]] = {}
    for part in text.replace(" ", "").split(",") if text else []:
        layer, _, heads = part.partition(":")
        if not all(number.isdecimal() for number in (layer, *heads.split("+"))) or int(layer) in chosen:
            raise UserError(f"keep_heads is {text!r}; give heads by layer, each layer once, such as 3:0+2,5:1")
        chosen[int(layer)] = [int(head) for head in heads.split("+")]
    return chosen


def require_unmatched(heads: Heads, n_heads: int) -> None:
    """Refuse layers of which all heads are kept where mixing matrices are to be matched.

    Raises:
        UserError: naming them.
    """
    whole = [index for index, chosen in heads.items() if len(chosen) == n_heads]
    if whole:
        raise UserError(
            f"keep_heads has all {n_heads} heads of layer {', '.join(map(str, whole))}, which leaves nothing there for"
            " mixing to match; name the layer in keep_attention, or leave the stage out"
        )


def require_heads(heads: Heads, layers: Sequence[str], n_heads: int, mixer: str) -> None:
    """Refuse heads that are not there, or not beside a mixer.

    Args:
        layers: one name a layer, ``"attention"`` or a mixer's.
        n_heads: of attention.
        mixer: the student's, of which there may be no layer.

    Raises:
        UserError: with the layer, and what would do.
    """
    if heads and mixer not in MIXERS:
        raise UserError(f"keep_heads is not for {mixer}, which keeps all heads; take {', '.join(sorted(MIXERS))}")
    for index, chosen in heads.items():
        depth = len(layers)
        if not 0 <= index < depth:
            raise UserError(f"keep_heads names layer {index}; the teacher has {depth}, numbered 0 to {depth - 1}")
        if layers[index] == ATTENTION:
            raise UserError(f"keep_heads names layer {index}, which keeps attention; leave it out of one of them")
        if layers[index] not in MIXERS:
            raise UserError(
                f"keep_heads names layer {index}, which window_layers names too: it keeps all heads, behind a window;"
                " leave it out of one of them"
            )
        outside = [head for head in chosen if not 0 <= head < n_heads]
        if outside or not chosen or len(set(chosen)) < len(chosen):
            raise UserError(
                f"keep_heads has {list(chosen)} in layer {index}; give at least one of the heads 0 to {n_heads - 1},"
                " none of them twice"
            )


def described(teacher: PreTrainedModel, views: Mapping[int, AttentionView], heads: Heads) -> dict[int, dict[str, Any]]:
    """What the kept heads of each layer are built with (``KeptHeads``), as plain data for the config.

    Args:
        teacher: may be without weights, on the meta device.
        views: of the layers that become mixers.
        heads: as checked.

    Raises:
        UserError: for norms that are not over single heads, of which a few heads alone have none.
    """
    family = family_of(teacher.config)
    made: dict[int, dict[str, Any]] = {}
    for index in sorted(heads):
        attention, seen = attention_of(layers_of(teacher)[index]), views[index]
        norms = (family or found(attention)).norms if seen.q_norm is not None else None
        if any(not _over_one_head(norm, seen.head_dim) for norm in (seen.q_norm, seen.k_norm)):
            raise UserError(
                f"keep_heads names layer {index}, whose queries and keys are normed over all heads together: a few"
                " heads alone have no such norm; keep attention in the whole layer (keep_attention)"
            )
        made[index] = {
            "heads": sorted(heads[index]),
            "n_kv_heads": seen.n_kv_heads,
            "scaling": seen.scaling,
            "window": seen.sliding_window,
            "softcap": seen.softcap,
            "rotates": seen.rotates,
            "norms": list(norms or ()),
            "biased": [name for name in ("q", "k", "v") if getattr(seen, name).bias is not None],
        }
    return made


@torch.no_grad()
def fill_heads_(hybrid: HeadHybrid, attention: AttentionView) -> None:
    """Copy the kept heads' weights from the layer they were in, and let the mixer's own of these heads say nothing.

    The output projection's bias, if there is one, is in the mixer's.
    """
    kept, width = hybrid.kept, attention.head_dim
    rows = {"q": kept.heads, "k": kept.kv_heads, "v": kept.kv_heads}
    for name, chosen in rows.items():
        projection, own = getattr(attention, name), getattr(kept, f"{name}_proj")
        own.weight.copy_(_of_heads(projection.weight, chosen, width))
        if own.bias is not None:
            own.bias.copy_(_of_heads(projection.bias, chosen, width))
    kept.o_proj.weight.copy_(_of_heads(attention.o.weight.T, kept.heads, width).T)
    for own, norm in ((kept.q_norm, attention.q_norm), (kept.k_norm, attention.k_norm)):
        if own is not None and norm is not None:
            own.load_state_dict(norm.state_dict())
    hybrid.mixer.out_proj.weight.unflatten(1, (-1, width))[:, kept.heads] = 0


def _of_heads(rows: Tensor, heads: Sequence[int], width: int) -> Tensor:
    """The rows of some heads, in their order."""
    return rows.unflatten(0, (-1, width))[list(heads)].flatten(0, 1)


def _over_one_head(norm: Any, width: int) -> bool:
    return norm is None or all(tuple(whole_shape(one)) == (width,) for one in norm.parameters())
