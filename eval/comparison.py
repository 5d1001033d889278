"""Several runs on one page: their final students in one table a teacher, their curves in one picture."""

from collections.abc import Mapping, Sequence
from typing import Any

from distill import units
from eval import verdict, words
from eval.figures import loss_charts, memory_of_runs, model_colour, task_charts_of_runs
from eval.page import filled, row_view
from eval.run_record import RunRecord
from eval.section_view import glance, section_view
from eval.sections.section import Section

View = dict[str, Any]
Runs = Mapping[str, RunRecord]
"""By the name that tells a run from the others, in the order they were given."""


def names_of_runs(runs: Sequence[RunRecord]) -> dict[str, RunRecord]:
    """Each run by its recipe's name; where two have the same, by its folder as given."""
    names = [run.name for run in runs]
    return {name if names.count(name) == 1 else str(run.folder): run for name, run in zip(names, runs, strict=True)}


def by_teacher(runs: Runs) -> dict[str, Runs]:
    """The runs of each teacher, by its path or hub id as the recipes say it."""
    paths = {name: str((run.recipe.get("teacher") or {}).get("path")) for name, run in runs.items()}
    return {path: {name: runs[name] for name in runs if paths[name] == path} for path in dict.fromkeys(paths.values())}


def final_rows(runs: Runs, numbers: Mapping[str, View]) -> list[View]:
    """What report.json says of each run's final student: its last row, with its costs over the whole run."""
    rows = []
    for name, run in runs.items():
        spent = [row for row in numbers[name]["rows"] if row["name"] != "teacher"]
        rows.append(
            spent[-1]
            | {
                "run": name,
                "layers": run.layers,
                "tokens": sum(row["tokens"] or 0 for row in spent),
                "seconds": sum(row["seconds"] or 0 for row in spent),
                "scored_tokens": numbers[name]["scored_tokens"],
                "state_bytes": run.memory and run.memory.state_bytes,
                "bytes_per_token": run.memory and run.memory.kv_bytes_per_token,
            }
        )
    return rows


def render_comparison(runs: Runs, rows: Sequence[View], sections: Sequence[Section]) -> str:
    """The page as HTML."""
    colours = {name: model_colour(place) for place, name in enumerate(runs)}
    of_run = {row["run"]: row for row in rows}
    return filled(
        "comparison.html.jinja",
        title=words.listed(list(runs)),
        notices=_notices(runs, of_run),
        groups=[_group(among, of_run, colours) for among in by_teacher(runs).values()],
        glance=glance([score for one in sections for score in one.scores]),
        sections=[section_view(one) for one in sections],
        samples=_samples(runs, colours),
        recipes=[{"name": name, "text": run.recipe_text} for name, run in runs.items()],
    )


def _group(among: Runs, of_run: Mapping[str, View], colours: Mapping[str, str]) -> View:
    """One teacher's students: the table, and its charts."""
    first = next(iter(among.values()))
    rows = [of_run[name] for name in among]
    drawn = [*loss_charts(among, colours), memory_of_runs(among, colours), *task_charts_of_runs(among, colours)]
    return {
        "teacher": verdict.teacher_name(first),
        "verdict": closest(rows),
        "scored": f"{rows[-1]['scored_tokens']:,}",
        "reference": _teacher(among, rows),
        "rows": [_row(of_run[name], among[name], colours[name]) for name in among],
        "charts": [chart for chart in drawn if chart.svg],
    }


def closest(rows: Sequence[View]) -> str:
    """Who is nearest to the teacher, and who holds the least."""
    told = []
    near = [row for row in rows if row["kl"] is not None and row["kl"] == row["kl"]]
    if len(near) > 1:
        best = min(near, key=lambda row: row["kl"])
        others = [f"{row['run']} {words.plain(row['kl'])}" for row in near if row is not best]
        told.append(f"Closest to the teacher is {best['run']}: KL {words.plain(best['kl'])}; {words.listed(others)}.")
    sized = [row for row in rows if row["state_bytes"] is not None]
    endless = [row["run"] for row in sized if not row["bytes_per_token"]]
    if endless and len(endless) < len(sized):
        told.append(f"Only the state of {words.listed(endless)} never grows with the text.")
    return " ".join(told)


def _row(row: View, run: RunRecord, colour: str) -> View:
    at = verdict.TILE_CONTEXT
    return row_view(row) | {
        "colour": colour,
        "heading": row["run"],
        "stage": row["heading"],
        "kinds": run.layers,
        "unfinished": bool(run.missing),
        "state": units.size(run.memory.state_bytes) if run.memory else words.NONE,
        "memory": units.size(run.memory.student(at)) if run.memory else words.NONE,
    }


def _teacher(among: Runs, rows: Sequence[View]) -> View | None:
    """The teacher's row, where the runs agree on what it scores."""
    losses = {row["teacher_loss"] for row in rows}
    if len(losses) > 1 or None in losses:
        return None
    row = {"name": "teacher", "heading": "teacher", "loss": losses.pop(), "perplexity": None, "perplexity_ratio": 1.0}
    row |= {"kl": 0.0, "agreement": 1.0, "recovered": None, "tokens": None, "seconds": None}
    row["perplexity"] = rows[0]["perplexity"] / rows[0]["perplexity_ratio"] if rows[0]["perplexity_ratio"] else None
    held = next((run.memory for run in among.values() if run.memory), None)
    at = verdict.TILE_CONTEXT
    return row_view(row) | {"memory": units.size(held.teacher(at)) if held else words.NONE}


def _notices(runs: Runs, of_run: Mapping[str, View]) -> list[str]:
    """What must be known before numbers are compared."""
    told = []
    groups = by_teacher(runs)
    if len(groups) > 1:
        teachers = words.listed([verdict.teacher_name(next(iter(among.values()))) for among in groups.values()])
        told.append(f"These runs have {len(groups)} teachers ({teachers}): compare within a teacher’s table only.")
    for among in groups.values():
        losses = {of_run[name]["teacher_loss"] for name in among}
        if len(losses) > 1:
            told.append(
                f"{words.listed(list(among))} were measured on different held-out texts (their teacher’s loss"
                " differs): compare ratios and gaps, not losses."
            )
    if waiting := [name for name, run in runs.items() if run.missing]:
        told.append(f"Not finished yet: {words.listed(waiting)}; the numbers are of what is there.")
    return told


def _samples(runs: Runs, colours: Mapping[str, str]) -> list[View]:
    """By prompt: the teacher's words, then each final student's."""
    by_prompt: dict[str, View] = {}
    for name, run in runs.items():
        evaluation = run.measured[-1].evaluation
        for sample in evaluation.samples if evaluation else ():
            one = by_prompt.setdefault(sample.prompt, {"prompt": sample.prompt, "said": []})
            teacher = verdict.teacher_name(run)
            if sample.teacher is not None and (teacher, sample.teacher) not in {
                (s["name"], s["raw"]) for s in one["said"]
            }:
                one["said"].append({"name": teacher, "raw": sample.teacher, "colour": "teacher"})
            one["said"].append({"name": name, "raw": sample.student, "colour": colours[name]})
    return list(by_prompt.values())
