"""Which heads of a teacher look things up: one at a time is made near-sighted, and what was asked is asked again.

    A_h    ↦ softmax(mask_W(scores_h))      head h sees its own token and the W − 1 before it
    heads_h ↦ 0                             or, W = 0, it says nothing: the output projection reads zeros in its place
    lost_h = log p(answers) − log p(answers with h like that)          mean over the answers, nats

Near-sighted rather than silent, because a head that reads the token before is missed as much as one that looks up, and
a mixer's short convolution does as well: W is its width. What is left is what a head is kept for.

What is asked is a recall task (`distill.recall`), or, of a teacher that knows none, repeated random tokens: x = r r, of
which the second half can only be known from the first ("In-context learning and induction heads", Olsson et al. 2022).
One head at a time: two that do the same work hide each other, and neither is found.

Source: heads chosen by retrieval under ablation, arXiv 2602.11374. H query heads, P channels a head.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from distill.attention import AttentionView, views
from distill.decoder import attention_of, layers_of
from distill.decoder_inputs import CACHES
from distill.errors import UserError
from distill.evaluating import evaluating
from distill.evaluation import device_of, evaluate
from distill.projections import module_of
from distill.recall.example import Example
from distill.recall.scoring import examine
from distill.selection.probe import repetitions

REACH = 4  # a mixer's convolution by default (`student.conv_width`)
SHORTEST = 16


@dataclass(frozen=True)
class Found:
    """What a model knew of what it was asked.

    Attributes:
        log_probability: of the answers, a mean in nats.
        written: share of answers that it wrote itself; None where it was not asked to write.
    """

    log_probability: float
    written: float | None = None


@dataclass(frozen=True)
class Head:
    """One head, and what the model knew when that was near-sighted.

    Attributes:
        lost: nats that it costs an answer; negative where the head disturbed.
    """

    layer: int
    head: int
    without: Found
    lost: float


Ask = Callable[[PreTrainedModel], Found]


def rank_heads(
    teacher: PreTrainedModel, ask: Ask, *, reach: int = REACH, layers: Iterable[int] | None = None
) -> tuple[Found, list[Head]]:
    """What the teacher knows as it is, and all heads of the given layers, the most missed first.

    Args:
        teacher: a stock model; no weight is touched.
        ask: the same question every time.
        reach: W, tokens that a head still sees, its own counted; 0 silences it.
        layers: all if None.

    Raises:
        UserError: attention cannot be read.
    """
    seen = views(teacher, range(len(layers_of(teacher))) if layers is None else layers)
    intact, heads = ask(teacher), []
    for layer, attention in seen.items():
        for head in range(attention.n_heads):
            module = attention_of(layers_of(teacher)[layer])
            with silenced(attention, [head]) if reach == 0 else near_sighted(module, attention, layer, [head], reach):
                without = ask(teacher)
            heads.append(Head(layer, head, without, intact.log_probability - without.log_probability))
    return intact, sorted(heads, key=lambda one: -one.lost)


def most_missed(heads: Sequence[Head], count: int) -> dict[int, list[int]]:
    """The first ``count`` of a ranking as ``student.keep_heads`` has them: heads by layer, both ascending.

    Raises:
        UserError: there are not so many.
    """
    if not 0 < count <= len(heads):
        raise UserError(f"{count} heads are to be kept; 1 to {len(heads)} were ranked")
    chosen: dict[int, list[int]] = {}
    for one in sorted(heads[:count], key=lambda one: (one.layer, one.head)):
        chosen.setdefault(one.layer, []).append(one.head)
    return chosen


@contextmanager
def silenced(attention: AttentionView, heads: Sequence[int]) -> Iterator[None]:
    """Inside, the output projection of a stock model's layer reads zeros where these heads' outputs stand."""

    def silence(_projection: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        by_head_BTHP = args[0].unflatten(-1, (attention.n_heads, attention.head_dim)).clone()
        by_head_BTHP[..., list(heads), :] = 0
        return (by_head_BTHP.flatten(-2), *args[1:])

    hook = module_of(attention.o).register_forward_pre_hook(silence)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def near_sighted(
    module: nn.Module, attention: AttentionView, layer: int, heads: Sequence[int], reach: int
) -> Iterator[None]:
    """Inside, these heads of a stock model's attention see their own token and the ``reach − 1`` before it.

    Args:
        module: the attention, computed by ``eager`` or ``sdpa``.
        attention: how it is read.
        layer: its index, for the cache.
    """
    names = tuple(inspect.signature(module.forward).parameters)

    def narrow(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        hidden_BTD, mask = kwargs[names[0]], kwargs.get("attention_mask")
        length, device = hidden_BTD.shape[1], hidden_BTD.device
        cache = next((kwargs[name] for name in ("cache", *CACHES) if kwargs.get(name) is not None), None)
        n_keys = length if cache is None else cache.get_mask_sizes(length, layer)[0]
        n_keys = n_keys if mask is None else mask.shape[-1]
        back_TS = torch.arange(n_keys - length, n_keys, device=device)[:, None] - torch.arange(n_keys, device=device)
        near_HTS = (back_TS >= 0).expand(attention.n_heads, -1, -1).clone()
        near_HTS[list(heads)] &= back_TS < reach
        if mask is None or mask.dtype == torch.bool:
            seen = near_HTS[None] if mask is None else mask & near_HTS
        else:
            seen = mask.masked_fill(~near_HTS, torch.finfo(mask.dtype).min)
        return (), {**kwargs, "attention_mask": seen}

    hook = module.register_forward_pre_hook(narrow, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def asking_recall(examples: Sequence[Example], batch_size: int = 16) -> Ask:
    """Ask a recall task's examples, to be written and to be preferred."""

    def ask(model: PreTrainedModel) -> Found:
        results = examine(model, examples, batch_size=batch_size)
        written = sum(one.written for one in results) / len(results)
        return Found(sum(one.log_probability for one in results) / len(results), written)

    return ask


def asking_repeated(ids: Sequence[int], *, rows: int, length: int, bos: int | None, seed: int = 0) -> Ask:
    """Ask for the second half of repeated random tokens.

    Args:
        ids: to draw from; what a teacher has never read would say little about it.
        rows: how many.
        length: tokens of a row, BOS included.
        bos: the id that every row begins with; None for none.
        seed: of what is drawn.

    Raises:
        UserError: rows are too short to repeat anything, or there are too few ids.
    """
    if length < SHORTEST + 1:
        raise UserError(f"rows of {length} tokens repeat too little; take {SHORTEST + 1} at least")
    (batch,) = repetitions(torch.tensor(list(ids)), rows, length, rows, bos, seed)

    def ask(model: PreTrainedModel) -> Found:
        with evaluating(model):
            here = {name: rows_BT.to(device_of(model)) for name, rows_BT in batch.items()}
            return Found(-evaluate(model, None, [here]).loss)

    return ask
