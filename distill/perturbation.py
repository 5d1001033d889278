"""How far one disturbed token moves what a model says behind it, token by token.

========  =============================================================================
symbol    meaning
========  =============================================================================
h_t       what a layer reads at position t
g         a random direction, of length 1
ε         size of the disturbance, relative to h_t
o_s       what the language-model head reads at position s
d_n       how far o moves n tokens on, relative to its own length and in units of ε
========  =============================================================================

::

    h'_t = h_t + ε ‖h_t‖ g                           in one layer, at one position of each row
    d_n  = ‖o'_{t+n} − o_{t+n}‖ / (ε ‖o_{t+n}‖)

A model whose mixers are stable lets d_n die out. So may attention, which gives one token among many little weight, but
nothing bounds it. Unlike an exponent this can be measured of any model, a teacher too.

Source: Mamba State-Space Models Are Lyapunov-Stable Learners (arXiv 2406.00209), whose experiment perturbs random
layers and follows the largest deviation.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.decoder import layers_of
from distill.errors import UserError
from distill.evaluating import evaluating
from distill.evaluation import device_of
from distill.head import final_states
from distill.within import within


@dataclass(frozen=True)
class Span:
    """What was seen at distances of ``first`` to ``last`` tokens behind a disturbance.

    Attributes:
        mean: of d_n.
        largest: of d_n.
        samples: how many positions.
    """

    first: int
    last: int
    mean: float
    largest: float
    samples: int


def deviations(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Tensor]],
    layers: Sequence[int],
    *,
    epsilon: float = 1e-3,
    draws: int = 2,
    seed: int = 0,
) -> list[Span]:
    """d_n over distances that double: 0, 1, 2, 3–4, 5–8, …; 0 is the disturbed position itself.

    Positions lie in the first half of every row, layers are drawn from ``layers``; both, and g, by the seed, so that
    two models of one width and text are disturbed alike. Of packed documents only the disturbed one counts. The model
    should be in fp32: bf16 rounds more away than ``epsilon``.

    Args:
        batches: dicts of ``input_ids``, ``position_ids`` (B, T) int64 and ``valid`` (B, T) bool.
        draws: disturbances of each row.

    Raises:
        UserError: a layer is not there, or nothing could be disturbed.
    """
    depth, device = len(layers_of(model)), device_of(model)
    if not layers or not all(0 <= layer < depth for layer in layers):
        raise UserError(f"layers {list(layers)} were to be disturbed; the model has layers 0 to {depth - 1}")
    generator = torch.Generator().manual_seed(seed)
    found: list[tuple[Tensor, Tensor]] = []
    with evaluating(model):
        for batch in batches:
            here = {name: tensor.to(device) for name, tensor in batch.items()}
            before_BTD = within(model, final_states, model, here)
            for _ in range(draws):
                layer = layers[int(torch.randint(len(layers), (), generator=generator))]
                place_B = _places(batch["valid"], generator).to(device)
                with _disturbed(layers_of(model)[layer], place_B, epsilon, generator):
                    after_BTD = within(model, final_states, model, here)
                moved_BT = (after_BTD - before_BTD).norm(dim=-1) / (epsilon * before_BTD.norm(dim=-1))
                found.append(_seen(moved_BT, here, place_B))
    distance_N, moved_N = (torch.cat(parts) for parts in zip(*found, strict=True)) if found else (torch.empty(0),) * 2
    if not len(distance_N):
        raise UserError("there is no token to disturb: the text is empty")
    return list(_spans(distance_N, moved_N.double()))


def _places(valid_BT: Tensor, generator: torch.Generator) -> Tensor:
    """A position in the first half of each row's tokens."""
    half_B = (valid_BT.sum(1) / 2).ceil()
    return (torch.rand(len(valid_BT), generator=generator) * half_B).long().cpu()


@contextmanager
def _disturbed(layer: nn.Module, place_B: Tensor, epsilon: float, generator: torch.Generator) -> Iterator[None]:
    """Inside, ``layer`` reads something else at ``place_B``."""

    def disturb(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        named = not args
        hidden_BTD = kwargs["hidden_states"] if named else args[0]
        rows_B = torch.arange(len(hidden_BTD), device=hidden_BTD.device)
        g_BD = torch.randn(len(hidden_BTD), hidden_BTD.shape[-1], generator=generator).to(hidden_BTD)
        h_BD = hidden_BTD[rows_B, place_B]
        moved_BTD = hidden_BTD.clone()
        moved_BTD[rows_B, place_B] = h_BD + epsilon * h_BD.norm(dim=-1, keepdim=True) * nn.functional.normalize(g_BD)
        return ((), {**kwargs, "hidden_states": moved_BTD}) if named else ((moved_BTD, *args[1:]), kwargs)

    handle = layer.register_forward_pre_hook(disturb, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _seen(moved_BT: Tensor, batch: Mapping[str, Tensor], place_B: Tensor) -> tuple[Tensor, Tensor]:
    """Distance from the disturbance and d there, for every later position of the disturbed documents."""
    distance_BT = torch.arange(moved_BT.shape[1], device=moved_BT.device) - place_B[:, None]
    document_BT = (batch["position_ids"].diff(dim=1) != 1).cumsum(1)
    document_BT = nn.functional.pad(document_BT, (1, 0))
    same_BT = document_BT == document_BT.gather(1, place_B[:, None])
    kept_BT = same_BT & batch["valid"] & (distance_BT >= 0)
    return distance_BT[kept_BT].cpu(), moved_BT[kept_BT].cpu()


def _spans(distance_N: Tensor, moved_N: Tensor) -> Iterator[Span]:
    first, last, farthest = 0, 0, int(distance_N.max())
    while first <= farthest:
        inside_N = moved_N[(distance_N >= first) & (distance_N <= last)]
        if len(inside_N):
            yield Span(first, last, float(inside_N.mean()), float(inside_N.max()), len(inside_N))
        first, last = last + 1, max(1, 2 * last)
