"""Numbers and lists as the report says them."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeVar

Item = TypeVar("Item")

NONE = "–"
MIXER_NAMES = {"mamba2": "Mamba-2", "discrete_mamba2": "discrete Mamba-2"}


def plain(value: float | None, digits: int = 3) -> str:
    """A number with ``digits`` decimals; beyond 1000 with separators, beyond a million as a power of ten."""
    if value is None:
        return NONE
    if not math.isfinite(value):
        return "∞" if value == math.inf else "not finite"
    if abs(value) >= 1e6:
        return f"{value:.1e}".replace("e+0", "e").replace("e+", "e")
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text


def percent(value: float | None) -> str:
    """A share as a percentage: one decimal, none from 1000 % on."""
    if value is None:
        return NONE
    return f"{plain(100 * value, 1)}%"


def times(value: float | None) -> str:
    """A ratio, such as ``×1.06``."""
    if value is None:
        return NONE
    return f"×{plain(value, 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0)}"


def amount(value: float | None) -> str:
    """A count of tokens or parameters to three digits, such as ``1.5M``."""
    return NONE if value is None else _scaled(value, 1000, ("", "K", "M", "B", "T"), "")


def context(tokens: float) -> str:
    """A context length in powers of 1024, such as ``32K``."""
    return _scaled(tokens, 1024, ("", "K", "M", "G"), "")


def size(value: float) -> str:
    """Bytes to three digits, such as ``1.25 MB``."""
    return _scaled(value, 1000, ("B", "kB", "MB", "GB", "TB", "PB"), " ")


def duration(seconds: float | None) -> str:
    """Time spent, such as ``48 s``, ``3 min 20 s`` or ``5 h 12 min``."""
    if seconds is None:
        return NONE
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def short(value: float) -> str:
    """An axis label: as few digits as the value needs."""
    return (
        amount(value) if abs(value) >= 1000 else f"{value:.6g}" if abs(value) >= 1e-4 or value == 0 else f"{value:.0e}"
    )


def runs(indices: Sequence[int]) -> str:
    """Layer numbers with neighbours joined: ``[0, 1, 2, 5]`` becomes ``0–2 and 5``."""
    if not indices:
        return "none"
    breaks = [at for at, (a, b) in enumerate(pairwise(indices), start=1) if b != a + 1]
    groups = [indices[a:b] for a, b in pairwise([0, *breaks, len(indices)])]
    return listed(groups, lambda group: f"{group[0]}" if len(group) == 1 else f"{group[0]}–{group[-1]}")


def listed(items: Sequence[Item], text: Callable[[Item], str] = str) -> str:
    """``a, b and c``."""
    *first, last = map(text, items)
    return f"{', '.join(first)} and {last}" if first else last


def _scaled(value: float, base: int, units: Sequence[str], space: str) -> str:
    index = 0
    while abs(value) >= 999.5 * base / 1000 and index < len(units) - 1:
        value, index = value / base, index + 1
    digits = 0 if index == 0 and value == int(value) else max(0, 2 - len(str(int(abs(value)))) + 1)
    text = f"{value:.{digits}f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return f"{text}{space}{units[index]}"
