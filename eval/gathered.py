"""The findings of several folders as one page shows them: in the order of SECTIONS, and one section for what belongs
together: findings of the same program with the same settings whose models differ."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from distill.errors import UserError
from eval.findings import Findings, read_findings
from eval.sections import SECTIONS
from eval.sections.section import Section

EVALUATIONS = "evaluations"
"""Where in a run directory its own findings stand."""


def findings_in(folder: Path) -> list[Findings]:
    """All that stand in FOLDER/*.json.

    Raises:
        UserError: there is none, or one is damaged.
    """
    files = sorted(folder.glob("*.json"))
    if not files:
        raise UserError(f"{folder}: holds no findings (KIND.json); give the --output of a measuring program")
    return [read_findings(file) for file in files]


def findings_of_run(folder: Path) -> list[Findings]:
    """Those of a run's own evaluations; it may have none."""
    return findings_in(folder / EVALUATIONS) if any((folder / EVALUATIONS).glob("*.json")) else []


def of_run(found: Findings, run: str) -> Findings:
    """The same, with the run's name before each student's, so that several runs can stand on one page."""
    return renamed(found, {name: f"{run}: {name}" for name in found.models if name != "teacher"})


def gathered(found: Sequence[Findings]) -> list[Findings]:
    """In the page's order, and joined where they belong together; unknown kinds are told and left out."""
    for kind in dict.fromkeys(one.kind for one in found if one.kind not in SECTIONS):
        print(f"{kind}: the report has no section for it; skipped (it has {', '.join(SECTIONS)})", file=sys.stderr)
    joined: list[Findings] = []
    for one in sorted((one for one in found if one.kind in SECTIONS), key=lambda one: list(SECTIONS).index(one.kind)):
        one = renamed(one, shorter_names(one))
        both = _joined(joined[-1], one) if joined else None
        joined[-1:] = [both] if both else [*joined[-1:], one]
    return joined


def shorter_names(found: Findings) -> dict[str, str]:
    """Models that are called by their whole path, by as many of its last folders as tell them from the others."""
    paths = [name for name, path in found.models.items() if name == path and "/" in name]

    def end(path: str, depth: int) -> str:
        return "/".join(path.rstrip("/").split("/")[-depth:])

    def is_clear(path: str, depth: int) -> bool:
        others = [end(other, depth) for other in paths if other != path]
        return end(path, depth) not in [*others, *(set(found.models) - set(paths))]

    return {
        path: next((end(path, d) for d in range(1, path.count("/") + 1) if is_clear(path, d)), path) for path in paths
    }


def section_of(found: Findings) -> Section:
    """Raises UserError where the findings are not what their program writes."""
    try:
        return SECTIONS[found.kind](found)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"the findings of eval.{found.kind} cannot be read ({type(error).__name__}: {error}); run it again"
        ) from error


def renamed(found: Findings, names: Mapping[str, str]) -> Findings:
    """The same findings of models with other names, wherever these stand in the results."""

    def anew(value: Any) -> Any:
        if isinstance(value, dict):
            return {names.get(key, key): anew(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [anew(inner) for inner in value]
        return names.get(value, value) if isinstance(value, str) else value

    return replace(found, models=anew(dict(found.models)), results=anew(found.results))


def _joined(one: Findings, other: Findings) -> Findings | None:
    """Both as one, where nothing contradicts."""
    if one.kind != other.kind or one.settings != other.settings:
        return None
    try:
        models, results = _merged(one.models, other.models), _merged(one.results, other.results)
    except ValueError:
        return None
    return replace(one, models=models, results=results)


def _merged(one: Any, other: Any) -> Any:
    """Dicts key by key; raises ValueError where two values differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        both = {key: _merged(value, other[key]) if key in other else value for key, value in one.items()}
        return both | {key: value for key, value in other.items() if key not in one}
    if one != other:
        raise ValueError("they differ")
    return one
