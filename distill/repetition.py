"""How much a text repeats itself, and how much a set of texts differ; of any tokens.

repeated_n   1 − |different n-grams| / |n-grams| of one text          (0: none comes twice)
distinct_n   |different n-grams| / |n-grams| of all texts together    (Li et al. 2016, §5.1)
"""

from collections.abc import Iterable, Sequence


def repeated(ids: Sequence[int], n: int) -> float:
    """The share of n-grams of one text that have stood in it before; 0 for a text shorter than two."""
    grams = _grams(ids, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct(texts: Iterable[Sequence[int]], n: int) -> float:
    """The share of different ones among the n-grams of all texts; 0 where there is none."""
    grams = [gram for ids in texts for gram in _grams(ids, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def longest_repeat(ids: Sequence[int]) -> int:
    """Tokens of the longest stretch that stands at two places, which may overlap.

    A stretch that comes twice has shorter ones that do, so the longest is found by halving.
    """
    found, beyond = 0, len(ids)
    while found + 1 < beyond:
        n = (found + beyond) // 2
        grams = _grams(ids, n)
        found, beyond = (n, beyond) if len(set(grams)) < len(grams) else (found, n)
    return found


def _grams(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(ids[start : start + n]) for start in range(len(ids) - n + 1)]
