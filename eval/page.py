"""The report's page: report.html.jinja and report.css filled with a run's numbers."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from distill import units
from distill.evaluation_record import MatrixPair
from eval import verdict, words
from eval.figures import closeness_charts, colour, memory_chart, task_charts, training_charts
from eval.pictures import DECADES, matrix_picture, scale_picture
from eval.run_record import RunRecord
from eval.section_view import glance, section_view
from eval.sections.section import Section

FOLDER = Path(__file__).parent

View = dict[str, Any]


def filled(template: str, **values: Any) -> str:
    """A template with the page's style; it escapes whatever comes from runs."""
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    css = Markup((FOLDER / "report.css").read_text(encoding="utf-8"))
    return environment.get_template(template).render(css=css, **values)


def render(run: RunRecord, numbers: View, sections: Sequence[Section] = ()) -> str:
    """The whole page of one run as HTML."""
    student = numbers["rows"][-1]
    return filled(
        "report.html.jinja",
        run=run,
        teacher_name=verdict.teacher_name(run),
        student_name=verdict.student_name(run),
        mixer_name=verdict.mixer_name(run),
        description=verdict.description(run),
        unfinished=verdict.unfinished(run),
        tiles=verdict.tiles(run, student),
        kept=verdict.kept(student),
        lost=verdict.lost(student, numbers["layer_distances"][student["name"]]),
        scored=f"{numbers['scored_tokens']:,}",
        glance=glance([score for one in sections for score in one.scores]),
        sections=[section_view(one) for one in sections],
        rows=[row_view(row) for row in numbers["rows"]],
        closeness=[chart for chart in closeness_charts(run) if chart.svg],
        samples=_samples(run),
        matrices=_matrices(run),
        memory=_memory(run, numbers),
        training=[chart for chart in (*task_charts(run), *training_charts(run)) if chart.svg],
        versions=sorted(numbers["versions"].items()),
    )


def row_view(row: View) -> View:
    """A line of the results table, as text."""
    trained = row["tokens"] or None
    return {
        "colour": colour(row["name"]),
        "heading": row["heading"].capitalize(),
        "loss": words.plain(row["loss"]),
        "perplexity": words.plain(row["perplexity"], 2),
        "ratio": words.times(row["perplexity_ratio"]),
        "kl": words.plain(row["kl"]),
        "agreement": words.percent(row["agreement"]),
        "agreement_share": _bar(row["agreement"]),
        "recovered": words.percent(row["recovered"]),
        "recovered_share": _bar(row["recovered"]),
        "tokens": words.amount(trained),
        "time": words.duration(row["seconds"] if trained else None),
    }


def _bar(share: float | None) -> str | None:
    """How full a bar is, 0 to 1."""
    return None if share is None or share != share else f"{min(max(share, 0), 1):.3f}"


def _samples(run: RunRecord) -> list[View]:
    """By prompt: the teacher's words, the student's, and what the student said at earlier stages."""
    by_prompt: dict[str, list[View]] = {}
    for stage in run.measured:
        for sample in stage.evaluation.samples if stage.evaluation else ():
            teacher = sample.teacher and sample.teacher.strip()
            same, own = parted(sample.student.strip(), teacher)
            view = {"colour": colour(stage.name), "heading": stage.heading, "same": same, "own": own}
            by_prompt.setdefault(sample.prompt, []).append(view | {"teacher": teacher})
    return [
        {"prompt": prompt, "teacher": last["teacher"], "last": last, "earlier": earlier}
        for prompt, (*earlier, last) in by_prompt.items()
    ]


def parted(student: str, teacher: str | None) -> tuple[str, str]:
    """The student's words as far as they are its teacher's, and the rest."""
    ours, theirs = (re.findall(r"\s*\S+|\s+$", text) for text in (student, teacher or ""))
    shared = next(
        (at for at, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
    )
    return "".join(ours[:shared]), "".join(ours[shared:])


def _matrices(run: RunRecord) -> View | None:
    """A row per head: the teacher's matrix, then the student's after each stage that kept some."""
    stages = [stage for stage in run.stages if stage.matrices]
    by_stage = [{(pair.layer, pair.head): pair for pair in stage.matrices} for stage in stages]
    heads = sorted({head for pairs in by_stage for head in pairs})
    if not heads:
        return None
    return {
        "headings": ["teacher", *(stage.heading for stage in stages)],
        "rows": [_matrix_row([pairs.get(head) for pairs in by_stage]) for head in heads],
        "tokens": max(len(pair.teacher) for pairs in by_stage for pair in pairs.values()),
        "scale": scale_picture(),
        "smallest": f"1/{10**DECADES:,}",
    }


def _matrix_row(pairs: list[MatrixPair | None]) -> View:
    found = [pair for pair in pairs if pair]
    first = found[0]
    teacher = {"picture": matrix_picture(first.teacher, float(np.abs(first.teacher).max()))}
    return {"layer": first.layer, "head": first.head, "cells": [teacher, *map(_student_matrix, pairs)]}


def _student_matrix(pair: MatrixPair | None) -> View | None:
    """Drawn on the teacher's scale after bringing it to the teacher's size, which is told beside it."""
    if pair is None:
        return None
    ratio = pair.size_ratio()
    return {
        "picture": matrix_picture(pair.student, float(np.abs(pair.teacher).max()) * (ratio if ratio > 0 else 1.0)),
        "cosine": words.plain(pair.cosine(), 2),
        "size": words.times(ratio),
    }


def _memory(run: RunRecord, numbers: View) -> View | None:
    if run.memory is None:
        return None
    return {
        "chart": memory_chart(run),
        "note": verdict.memory(run.memory),
        "rows": [
            {
                "context": words.context(row["context"]),
                "teacher": units.size(row["teacher_bytes"]),
                "student": units.size(row["student_bytes"]),
                "saved": verdict.less(row["teacher_bytes"], row["student_bytes"]),
            }
            for row in numbers["memory"]
        ],
    }
