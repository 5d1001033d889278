"""Numbers for people, with the three digits that matter, and back: counts, bytes and times."""

import re

_DECIMAL = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12, "P": 10**15}
_BYTES = {f"{letter}B": 10**power for letter, power in zip("KMGT", (3, 6, 9, 12), strict=True)} | {
    f"{letter}iB": 2**power for letter, power in zip("KMGT", (10, 20, 30, 40), strict=True)
}


def count(number: float) -> str:
    """1234567 as ``1.23M``."""
    for unit in ("", "K", "M", "B", "T", "P", "E", "Z"):
        if abs(number) < 999.5 or unit == "Z":
            return f"{number:.0f}{unit}" if number == int(number) and number < 1000 else f"{number:.3g}{unit}"
        number /= 1000
    raise AssertionError("unreachable")


def size(n_bytes: float) -> str:
    """Bytes as ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if n_bytes < 1024 or unit == "TiB":
            return f"{n_bytes:.0f} {unit}" if unit == "B" or n_bytes >= 100 else f"{n_bytes:.3g} {unit}"
        n_bytes /= 1024
    raise AssertionError("unreachable")


def duration(seconds: float) -> str:
    """Seconds as ``40 s``, ``12 min``, ``3.4 h`` or ``5.1 days``."""
    for length, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.0f} {unit}" if unit == "min" else f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 1 else "under 1 s"


def read_count(text: str) -> float:
    """``400T`` as 4e14; K, M, B (or G), T and P are powers of 1000.

    Raises:
        ValueError: it is not a positive number with one of these letters or none.
    """
    return _read(text, _DECIMAL)


def read_size(text: str) -> float:
    """``80GB`` as 8e10 and ``79GiB`` as 79 · 2³⁰ bytes; always with a unit, because a bare 80 could be anything.

    Raises:
        ValueError: it is not a positive number with such a unit.
    """
    return _read(text, _BYTES)


def _read(text: str, units: dict[str, int]) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2] not in units or not float(match[1]):
        raise ValueError(text)
    return float(match[1]) * units[match[2]]
