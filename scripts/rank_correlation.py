"""How far two orders agree: Spearman's ρ and Kendall's τ, from −1 (reversed) to 1 (the same).

    ρ = correlation of the ranks            of equal values each has the mean of their ranks
    τ = (c − d) / √((c + d + t_x) (c + d + t_y))

over all pairs: c pairs are ordered alike in x and y, d oppositely, t_x are equal in x alone, t_y in y alone (τ_b).
"""

from collections.abc import Sequence
from itertools import combinations
from math import sqrt
from statistics import mean


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """ρ; None where one of the two has no order at all."""
    ranks_x, ranks_y = _ranks(x), _ranks(y)
    mean_x, mean_y = mean(ranks_x), mean(ranks_y)
    product = sum((a - mean_x) * (b - mean_y) for a, b in zip(ranks_x, ranks_y, strict=True))
    size = sqrt(sum((a - mean_x) ** 2 for a in ranks_x) * sum((b - mean_y) ** 2 for b in ranks_y))
    return product / size if size else None


def kendall(x: Sequence[float], y: Sequence[float]) -> float | None:
    """τ_b; None where one of the two has no order at all."""
    pairs = list(combinations(zip(x, y, strict=True), 2))
    signs = [(_sign(a[0] - b[0]), _sign(a[1] - b[1])) for a, b in pairs]
    agreement = sum(sign_x * sign_y for sign_x, sign_y in signs)
    size = sqrt(sum(sign_x != 0 for sign_x, _ in signs) * sum(sign_y != 0 for _, sign_y in signs))
    return agreement / size if size else None


def _ranks(values: Sequence[float]) -> list[float]:
    """From 1 for the smallest."""
    return [sum(other < value for other in values) + (1 + list(values).count(value)) / 2 for value in values]


def _sign(difference: float) -> int:
    return (difference > 0) - (difference < 0)
