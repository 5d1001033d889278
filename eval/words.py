"""Numbers and lists as the report says them."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeVar

from distill import units

Item = TypeVar("Item")

NONE = "–"


def plain(value: float | None, digits: int = 3) -> str:
    """A number with ``digits`` decimals; beyond 1000 with separators, beyond a million as a power of ten."""
    if value is None:
        return NONE
    if not math.isfinite(value):
        return "∞" if value == math.inf else "not finite"
    size = abs(value)
    if size >= 1e6:
        text = f"{size:.1e}".replace("e+0", "e").replace("e+", "e")
    else:
        text = f"{size:,.0f}" if size >= 1000 else f"{size:.{digits}f}"
    return f"−{text}" if value < 0 and float(text.replace(",", "")) else text


def percent(value: float | None) -> str:
    """A share as a percentage: one decimal, none from 1000 % on."""
    if value is None:
        return NONE
    return f"{plain(100 * value, 1)}%" if math.isfinite(value) else plain(value)


def times(value: float | None) -> str:
    """A ratio, such as ``×1.06``."""
    if value is None:
        return NONE
    return f"×{plain(value, 2 if abs(value) < 10 else 1)}" if math.isfinite(value) else plain(value)


def amount(value: float | None) -> str:
    """A count of tokens or parameters, such as ``1.5M``."""
    return NONE if value is None else units.count(value)


def duration(seconds: float | None) -> str:
    """Time spent, such as ``48 s`` or ``12 min``."""
    return NONE if seconds is None else units.duration(seconds)


def context(tokens: int) -> str:
    """A context length in powers of 1024, such as ``32K``."""
    return f"{tokens // 1024}K" if tokens >= 1024 else f"{tokens}"


def short(value: float) -> str:
    """An axis label: as few digits as the value needs."""
    if abs(value) >= 1000:
        return units.count(value)
    return f"{value:.6g}" if abs(value) >= 1e-4 or value == 0 else f"{value:.0e}"


def runs(indices: Sequence[int]) -> str:
    """Layer numbers with neighbours joined: ``[0, 1, 2, 5]`` becomes ``0–2 and 5``."""
    if not indices:
        return "none"
    breaks = [at for at, (a, b) in enumerate(pairwise(indices), start=1) if b != a + 1]
    groups = [indices[a:b] for a, b in pairwise([0, *breaks, len(indices)])]
    return listed(groups, lambda group: f"{group[0]}" if len(group) == 1 else f"{group[0]}–{group[-1]}")


def counted_layers(indices: Sequence[int]) -> str:
    """``layer 3`` or ``layers 0–2 and 5``."""
    return f"{'layer' if len(indices) == 1 else 'layers'} {runs(indices)}"


def listed(items: Sequence[Item], text: Callable[[Item], str] = str) -> str:
    """``a, b and c``."""
    *first, last = map(text, items)
    return f"{', '.join(first)} and {last}" if first else last
