"""How well a model predicts a long text, position by position, without anything as long as the text times a vocabulary.

    loss_t = −log p(x_{t+1} | x_0 … x_t)                     t = 0 … T−2

The text goes through the model's own cache chunk by chunk: a student's states, a teacher's keys and values. What is
measured is therefore also what serving it would be: prefill in chunks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, PreTrainedModel

from distill.decoder import learns_positions
from distill.evaluating import evaluating
from distill.evaluation import device_of

CHUNK = 512  # tokens a forward pass
STEPS = 2  # buckets for each doubling of the position
FIRST = 16  # no bucket but the first ends before


@dataclass(frozen=True)
class Bucket:
    """Predictions from more than ``above`` and up to ``to`` tokens of context; losses in nats a token.

    Attributes:
        error: standard error over documents; None where there is only one.
    """

    above: int
    to: int
    loss: float
    error: float | None


def losses(model: PreTrainedModel, ids: Sequence[int], chunk: int = CHUNK) -> Tensor:
    """The loss of each prediction: of the first from one token of context, of the last from T − 1; fp32 on the CPU.

    Args:
        ids: of one text, T ≥ 2.
        chunk: tokens a forward pass; memory is that of their logits, and of the model's cache.
    """
    device = device_of(model)
    found = []
    with evaluating(model):
        cache = DynamicCache(config=model.config)
        for start in range(0, len(ids) - 1, chunk):
            read = torch.tensor([ids[start : min(start + chunk, len(ids) - 1)]], device=device)
            positions = torch.arange(start, start + read.shape[1], device=device)[None]
            logits_BTV = model(input_ids=read, position_ids=positions, past_key_values=cache, use_cache=True).logits
            next_T = torch.tensor(ids[start + 1 : start + 1 + read.shape[1]], device=device)
            found.append(cross_entropy(logits_BTV[0].float(), next_T, reduction="none").cpu())
    return torch.cat(found)


def by_position(of_documents: Sequence[Tensor], edges: Sequence[int]) -> list[Bucket]:
    """Means over all documents, between neighbouring edges.

    Args:
        of_documents: what ``losses`` gives, each at least as long as the last edge.
        edges: numbers of tokens of context, rising from 0; see ``edges_for``.
    """
    means = [[float(one[above:to].double().mean()) for one in of_documents] for above, to in pairwise(edges)]
    return [Bucket(above, to, *_mean(found)) for (above, to), found in zip(pairwise(edges), means, strict=True)]


def by_context(
    model: PreTrainedModel,
    documents: Sequence[Sequence[int]],
    contexts: Sequence[int],
    last: int,
    chunk: int = CHUNK,
) -> list[tuple[int, float]]:
    """The loss of the same tokens, from more and more of what stands before them: (context, loss).

    Args:
        contexts: numbers of tokens that are read before the first of the tokens that are predicted.
        last: how many tokens at the end of each document are predicted.
    """
    found = []
    for context in contexts:
        ends = [losses(model, ids[-last - context :], chunk)[-last:] for ids in documents]
        found.append((context, _mean([float(end.double().mean()) for end in ends])[0]))
    return found


def edges_for(trained: int, longest: int) -> list[int]:
    """Edges from 0 to ``longest``, STEPS a doubling from FIRST on: the length trained on is one of them."""
    low, high = (math.log2(size / trained) * STEPS for size in (FIRST, longest))
    edges = {round(trained * 2 ** (step / STEPS)) for step in range(math.ceil(low), math.floor(high) + 1)}
    return sorted({0, *edges, min(trained, longest), longest})


def contexts_for(trained: int, longest: int) -> list[int]:
    """An eighth of the length trained on, doubled up to ``longest``, which is the last."""
    doubled = [trained * 2**power // 8 for power in range(longest.bit_length() + 3)]
    return [*(size for size in doubled if 0 < size < longest), longest]


def longest_context(model: PreTrainedModel) -> int | None:
    """Where a model's learned positions end; None where it has none, whatever it was trained on."""
    return model.config.get_text_config().max_position_embeddings if learns_positions(model) else None


def _mean(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))
