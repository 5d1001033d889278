"""Layers in the order in which their attention is worth keeping, and the sets of layers that follow from it.

    S_K = the first K of the order

Near the K-th place scores may be too close to tell. The *borderline* are the layers nearest to the line between the
K-th and the one behind it; which of them are in is decided anew, by sets:

    choices = { sure ∪ M : M ⊂ borderline, |sure ∪ M| = K }       sure = S_K without the borderline
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from distill.layout import evenly_spaced

Layers = tuple[int, ...]


@dataclass(frozen=True)
class Ranking:
    """What a method made of the layers.

    Attributes:
        order: all candidates, the one most worth keeping first.
        scores: of each candidate, the higher the more it is worth; empty where a method only names layers.
        unit: what a score is.
        rounds: where layers were chosen one after another, the scores of each round, by layer; else empty.
    """

    order: Layers
    scores: Mapping[int, float]
    unit: str
    rounds: tuple[Mapping[int, float], ...] = ()

    def first(self, keep: int) -> Layers:
        """The ``keep`` best, ascending."""
        return tuple(sorted(self.order[:keep]))


def by_score(scores: Mapping[int, float], unit: str) -> Ranking:
    """The highest score first; of equal ones the lower layer."""
    return Ranking(tuple(sorted(scores, key=lambda layer: (-scores[layer], layer))), scores, unit)


def uniform(candidates: Sequence[int], keep: int) -> Layers:
    """Spread evenly over the candidates, each the last of its equal share."""
    return tuple(sorted(candidates)[place] for place in evenly_spaced(keep, len(candidates)))


def last(candidates: Sequence[int], keep: int) -> Layers:
    """The last ones."""
    return tuple(sorted(candidates)[len(candidates) - keep :])


def first_last(candidates: Sequence[int], keep: int) -> Layers:
    """From both ends, one more of the first where the number is odd."""
    ordered = sorted(candidates)
    return tuple(ordered[: (keep + 1) // 2] + ordered[len(ordered) - keep // 2 :])


BASELINES = {"uniform": uniform, "last": last, "first_last": first_last}
"""Choices by the layers' places alone."""


def by_place(candidates: Sequence[int], chosen: Layers) -> Ranking:
    """A choice without scores, the other layers behind it."""
    return Ranking((*chosen, *(layer for layer in candidates if layer not in chosen)), {}, "by its place alone")


def choices(ranking: Ranking, keep: int, borderline: int) -> list[Layers]:
    """The sets that differ from ``S_K`` by borderline layers alone, ``S_K`` first.

    Args:
        ranking: with scores.
        keep: K.
        borderline: how many layers are doubtful: those with scores nearest to the line. Where layers were chosen one
            after another, only the last choice is, and its rivals are the best of that round.
    """
    chosen = ranking.order[:keep]
    if ranking.rounds:
        doubtful = sorted(ranking.rounds[-1], key=lambda layer: -ranking.rounds[-1][layer])[:borderline]
    else:
        doubtful = _nearest(ranking, keep, borderline)
    sure = [layer for layer in chosen if layer not in doubtful]
    sets = [tuple(sorted((*sure, *more))) for more in combinations(doubtful, keep - len(sure))]
    return sorted(dict.fromkeys(sets), key=lambda layers: layers != tuple(sorted(chosen)))


def _nearest(ranking: Ranking, keep: int, borderline: int) -> list[int]:
    """The layers with scores nearest to the middle between the K-th and the one behind it, at least one of each side.

    So the choice is never between layers that are all in, or all out.
    """
    if keep >= len(ranking.order):
        return []
    inside, outside = ranking.order[keep - 1], ranking.order[keep]
    line = (ranking.scores[inside] + ranking.scores[outside]) / 2
    others = [layer for layer in ranking.order if layer not in (inside, outside)]
    return [inside, outside, *sorted(others, key=lambda layer: abs(ranking.scores[layer] - line))][:borderline]
