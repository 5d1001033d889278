"""Numbers for people: counts, bytes and times, with the three digits that matter."""


def count(number: float) -> str:
    """1234567 as ``1.23M``."""
    for unit in ("", "K", "M", "B", "T", "P", "E"):
        if abs(number) < 999.5 or unit == "E":
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
