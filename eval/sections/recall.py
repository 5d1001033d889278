"""eval.recall in the report: heat maps of each task and score, model beside model, and what was kept of each task."""

from collections.abc import Mapping, Sequence
from typing import Any

from distill.recall import TASKS
from eval import words
from eval.findings import Findings
from eval.sections.section import HeatMap, Score, Section

Cells = Sequence[Mapping[str, Any]]

MAPS = {
    "written": ("Written", 0.0, "the whole answer, exactly, by greedy decoding"),
    "chosen": ("Preferred", 0.0, "the answer is likelier than the other choices"),
    "gap": ("Gap", -1.0, "preferred − written: what likelihood sees and generation does not"),
}
ALL_ANSWERS = ("parity", "permutation")
"""Tasks whose choices are all the answers there are, so that blind writing may be right as well."""


def section(found: Findings) -> Section:
    scores = [_score(task, by_model, found) for task, by_model in found.results.items()]
    return Section(
        "Recall from the prompt",
        " ".join([_kept(scores, found), _flattered(found)]).strip(),
        maps=[one for task, by_model in found.results.items() for one in _maps(task, by_model)],
        scores=scores,
    )


def reference(found: Findings) -> str:
    """The model that the others are compared with: the one called teacher, else the first."""
    return "teacher" if "teacher" in found.models else next(iter(found.models))


def _score(task: str, by_model: Mapping[str, Cells], found: Findings) -> Score:
    """Means over the cells that all models have."""
    shared = set.intersection(*({_place(cell) for cell in cells} for cells in by_model.values()))
    chances = [cell["chance"] for cells in by_model.values() for cell in cells]
    return Score(
        f"recall: {task}",
        reference(found),
        _mean(chances) if task in ALL_ANSWERS else 0.0,
        {name: _mean([c["written"] for c in cells if _place(c) in shared]) for name, cells in by_model.items()},
    )


def _kept(scores: Sequence[Score], found: Findings) -> str:
    """What each student still writes of what its teacher writes."""
    teacher = reference(found)
    told = []
    for model in found.models:
        shares = [share for one in scores if (share := one.kept(model)) is not None]
        if model != teacher and shares:
            worst = min((one for one in scores if one.kept(model) is not None), key=lambda one: one.kept(model) or 0)
            least = f", least of {worst.task.removeprefix('recall: ')}" if len(shares) > 1 else ""
            told.append(f"{model} still writes {words.percent(_mean(shares))}{least}")
    if told:
        return f"Of the answers that {teacher} writes, {words.listed(told)}."
    return "" if len(found.models) == 1 else f"Even {teacher} writes hardly an answer of these tasks."


def _flattered(found: Findings) -> str:
    """The widest gap between what a model prefers and what it writes."""
    gaps = {
        (task, name): _mean([cell["gap"] for cell in cells])
        for task, by_model in found.results.items()
        for name, cells in by_model.items()
    }
    (task, name), gap = max(gaps.items(), key=lambda item: item[1])
    if gap < 0.1:
        return ""
    more = f"in {100 * gap:.0f} of 100 cases"
    return f"Likelihood flatters: in {task}, {name} prefers the right answer yet does not write it {more}."


def _maps(task: str, by_model: Mapping[str, Cells]) -> list[HeatMap]:
    cells = [cell for found in by_model.values() for cell in found]
    lengths, items = sorted({cell["length"] for cell in cells}), sorted({cell["items"] for cell in cells})
    says = f" ({TASKS[task].says})" if task in TASKS else ""
    return [
        HeatMap(
            name,
            [str(number) for number in items],
            [words.context(length) if length else "short" for length in lengths],
            "items",
            "length in tokens",
            {(items.index(c["items"]), lengths.index(c["length"])): c[key] for c in by_model[name]},
            low=low,
            group=f"{task.capitalize()}{says * (key == 'written')}: {heading.lower()}, in percent: {means}",
        )
        for key, (heading, low, means) in MAPS.items()
        for name in by_model
    ]


def _place(cell: Mapping[str, Any]) -> tuple[int, int]:
    return cell["items"], cell["length"]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
