"""What a conversion did, for people: layers, where the weights came from, parameters, cache."""

from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from distill.conversion import CONTEXTS, Report
from distill.layout import ATTENTION, WINDOWED
from distill.recipe import TEXT_ROLES
from distill.roles import ROLES
from distill.units import count, size


def render(report: Report) -> RenderableType:
    """The whole report, on one screen."""
    return Group(layers(report), origins(report), parameters(report), cache(report))


def layers(report: Report) -> Text:
    """One letter a layer, and which keep attention."""
    kinds = report.layers
    mixer = next((kind for kind in kinds if kind not in (ATTENTION, WINDOWED)), None)
    mixer = mixer or (WINDOWED if WINDOWED in kinds else "mixers")
    windows = [str(index) for index, kind in enumerate(kinds) if kind == WINDOWED != mixer]
    line = Text("layers  ")
    for index, kind in enumerate(kinds):
        letter = _letter(kind, mixer, index in report.heads)
        line.append(f"{letter} ", style="cyan" if letter == "m" else "yellow")
    kept = [str(index) for index, kind in enumerate(kinds) if kind == ATTENTION]
    positions = " with rotary positions" if report.rope == "keep" else ""
    line.append(f" {len(kinds) - len(kept) - len(windows)} of {len(kinds)} become {mixer} (m){positions}")
    if windows:
        line.append(f"; {'layer' if len(windows) == 1 else 'layers'} {', '.join(windows)} attend behind a window (w)")
    if kept:
        line.append(f"; {'layer' if len(kept) == 1 else 'layers'} {', '.join(kept)} with attention (a)")
    if report.heads:
        named = "; ".join(f"{index}: {', '.join(map(str, heads))}" for index, heads in report.heads.items())
        line.append(f"; heads that keep attention beside a mixer (h), by layer: {named}")
    if report.view_error is not None:
        line.append(
            f"\n        attention as it was read, recomputed: off by {report.view_error:.0e} of its size at most"
        )
    return line


def _letter(kind: str, mixer: str, has_heads: bool) -> str:
    if kind == ATTENTION:
        return "a"
    if kind != mixer:
        return "w"
    return "h" if has_heads else "m"


def origins(report: Report) -> Table:
    """Where each part of the mixers came from, once for all layers that were seeded alike."""
    alike: dict[tuple, list[int]] = {}
    for index, parts in report.seeded.items():
        alike.setdefault(tuple(parts), []).append(index)
    grid = table("mixer weights", ["from"], justify="left")
    for origin, indices in alike.items():
        if len(alike) > 1:
            grid.add_row(f"layers {', '.join(map(str, indices))}:")
        for part in origin:
            grid.add_row(Text(part.target), Text(part.source))
    return grid


def parameters(report: Report) -> Table:
    """Parameters by role, before and after."""
    shown = [role for role in ROLES if role in TEXT_ROLES or report.parameters_before[role]]
    grid = table("parameters", [*shown, "total"])
    for name, counts in (("teacher", report.parameters_before), ("student", report.parameters_after)):
        by_role = (count(counts[role]) if counts[role] else "-" for role in shown)
        grid.add_row(name, *by_role, count(sum(counts.values())))
    return grid


def cache(report: Report) -> Table:
    """Bytes that a sequence takes while text is generated, by its length."""
    grid = table("cache a sequence at", [f"{tokens // 1024}K tokens" for tokens in CONTEXTS])
    pairs = [report.cache_bytes(tokens) for tokens in CONTEXTS]
    grid.add_row("teacher", *(size(teacher) for _, teacher in pairs))
    grid.add_row(f"student (state {size(report.state_bytes)})", *(size(student) for student, _ in pairs))
    return grid


def table(title: str, columns: Iterable[str], justify: str = "right") -> Table:
    """A table without lines whose first column is named by its title."""
    grid = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    grid.add_column(title)
    for column in columns:
        grid.add_column(column, justify=justify)  # type: ignore[arg-type]
    return grid
