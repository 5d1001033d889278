"""Interpolated modified Kneser-Ney n-grams over token ids: the baseline that a language model must beat.

Chen & Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling" (1998), section 4.1.6. With
w the token, h the k-1 tokens before it, h' those without the oldest, and c the counts of order k::

    p_k(w | h) = max(c(hw) - D_k(c(hw)), 0) / c(h·)  +  gamma_k(h) p_{k-1}(w | h'),      p_0 = 1 / V

The highest order counts occurrences; each lower order counts the different tokens seen before the k-gram
("continuation" counts). D_k takes the values D_1, D_2, D_3+ for counts 1, 2 and more, each estimated from how
many k-grams occur once, twice, three and four times. gamma_k(h) is the mass that discounting took from h.

A k-gram is one int64, its tokens read as digits in base V, so an order is two sorted arrays and a look-up
is a binary search.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Order:
    """One order: its k-grams with counts, and of every context its total count and interpolation weight."""

    grams: Ids
    counts: Ids
    contexts: Ids
    totals: Ids
    gammas: Floats
    discounts: Floats


class KneserNey:
    """Interpolated modified Kneser-Ney model of order ``n`` over ids below ``vocabulary``."""

    def __init__(self, documents: Sequence[Ids], n: int, vocabulary: int) -> None:
        """Count ``documents``, each an id array (L,) whose first token is context only (the BOS)."""
        assert vocabulary**n < 2**63, "a k-gram must fit an int64"
        self.vocabulary = vocabulary
        self.orders: list[Order] = []
        grams = np.concatenate([_grams(document, n, vocabulary)[1:] for document in documents])
        grams, counts = np.unique(grams, return_counts=True)
        for k in range(n, 0, -1):
            self.orders.insert(0, _order(grams, counts, vocabulary))
            grams, counts = np.unique(grams % vocabulary ** (k - 1), return_counts=True)

    def log_probabilities(self, document: Ids) -> Floats:
        """Natural-log probability (L - 1,) of each token after the first, given all tokens before it."""
        p = np.full(len(document) - 1, 1 / self.vocabulary)
        for k, order in enumerate(self.orders, start=1):
            grams = _grams(document, k, self.vocabulary)[1:]
            counts = _look_up(order.grams, order.counts, grams)
            contexts = grams // self.vocabulary
            totals = _look_up(order.contexts, order.totals, contexts)
            gammas = _look_up(order.contexts, order.gammas, contexts)
            kept = counts - order.discounts[np.minimum(counts, 3)]
            # A context that was never seen has no counts of its own: the lower order answers alone.
            p = np.where(totals > 0, kept / np.maximum(totals, 1) + gammas * p, p)
        return np.log(p)


def _grams(document: Ids, k: int, vocabulary: int) -> Ids:
    """The k-gram that ends at each token (L,); before the document stand copies of its first token."""
    padded = np.concatenate([np.repeat(document[:1], k - 1), document]).astype(np.int64)
    grams = np.zeros(len(document), np.int64)
    for i in range(k):
        grams = grams * vocabulary + padded[i : i + len(document)]
    return grams


def _order(grams: Ids, counts: Ids, vocabulary: int) -> Order:
    """Discounts and context weights of one order, from its sorted k-grams."""
    n1, n2, n3, n4 = (max(int((counts == c).sum()), 1) for c in (1, 2, 3, 4))
    y = n1 / (n1 + 2 * n2)
    discounts = np.clip([0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3], 0, [0, 1, 2, 3])
    contexts, first = np.unique(grams // vocabulary, return_index=True)
    totals = np.add.reduceat(counts, first)
    gammas = np.add.reduceat(discounts[np.minimum(counts, 3)], first) / totals
    return Order(grams, counts, contexts, totals, gammas, discounts)


def _look_up(keys: Ids, values: NDArray, wanted: Ids) -> NDArray:
    """``values`` at ``wanted`` keys, 0 where a key is absent; ``keys`` are sorted."""
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], 0)
