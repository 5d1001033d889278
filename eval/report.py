"""Tell what became of a run, or of several side by side, as one page and as numbers.

    python -m eval.report runs/quickstart
    python -m eval.report runs/hybrid runs/mamba --with runs/recall --output runs/side-by-side

writes report.html, one file without scripts or links to anywhere, and report.json with its numbers: one run's into its
own folder. What measuring programs found (``eval.findings``) becomes a section of the page: all that stands in
RUN_DIR/evaluations, and in every folder given by --with. The same runs make the same files, so a report can be compared
with another one. A run that is not finished gets a report of what there is, which says so.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from distill.atomic import explained_full_disk, replace_file
from distill.conversion import CONTEXTS
from distill.errors import UserError
from distill.evaluation import Metrics, perplexity, perplexity_ratio
from distill.evaluation_record import json_numbers
from distill.programs import report_user_errors
from eval.comparison import by_teacher, final_rows, names_of_runs, render_comparison
from eval.findings import Findings, require_folder
from eval.gathered import findings_in, findings_of_run, gathered, of_run, section_of
from eval.page import render
from eval.run_record import RunRecord, Stage, read_run
from eval.section_view import glance_numbers
from eval.sections.section import Section

VERSION = 1
SEVERAL = Path("runs/report")


def make_report(folder: str | Path, beside: Sequence[Path] = (), output: Path | None = None) -> Path:
    """Write both files of a run's report and return the path of the page.

    Args:
        folder: the run directory.
        beside: folders with findings, besides the run's own.
        output: where the files go; into the run directory unless given.

    Raises:
        UserError: the folder is no run directory, nothing in it is evaluated yet, or a file is damaged.
    """
    run = read_run(folder)
    found = gathered([*findings_of_run(run.folder), *(one for folder in beside for one in findings_in(folder))])
    sections = [section_of(one) for one in found]
    numbers = report_numbers(run) | findings_numbers(found, sections)
    return _written(output or run.folder, render(run, numbers, sections), numbers)


def make_comparison(folders: Sequence[Path], beside: Sequence[Path], output: Path) -> Path:
    """Write both files of several runs' report and return the path of the page; see ``make_report``.

    report.json: ``runs``, each as ``report_numbers`` has it; ``teachers``, the names of the runs that each one has;
    ``students``, the last row of each run with its costs over the whole run.
    """
    runs = names_of_runs([read_run(folder) for folder in folders])
    if len(runs) < len(folders):
        raise UserError(f"{', '.join(map(str, folders))}: a run is given twice")
    own = [of_run(found, name) for name, run in runs.items() for found in findings_of_run(run.folder)]
    found = gathered([*own, *(one for folder in beside for one in findings_in(folder))])
    sections = [section_of(one) for one in found]
    numbers = {name: report_numbers(run) for name, run in runs.items()}
    rows = final_rows(runs, numbers)
    told = {
        "version": VERSION,
        "teachers": {path: list(among) for path, among in by_teacher(runs).items()},
        "students": rows,
        "runs": numbers,
    }
    return _written(output, render_comparison(runs, rows, sections), told | findings_numbers(found, sections))


def findings_numbers(found: Sequence[Findings], sections: Sequence[Section]) -> dict[str, Any]:
    """``kept``: each task's scores and the shares of its teacher's; ``findings`` as they are."""
    scores = [score for one in sections for score in one.scores]
    return {"kept": glance_numbers(scores), "findings": [vars(one) for one in found]}


def _written(folder: Path, page: str, numbers: dict[str, Any]) -> Path:
    text = json.dumps(json_numbers(numbers), indent=2, ensure_ascii=False)
    with explained_full_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / "report.json", f"{text}\n".encode())
        replace_file(folder / "report.html", page.encode())
    return folder / "report.html"


def report_numbers(run: RunRecord) -> dict[str, Any]:
    """Everything that report.json says; the page shows the same numbers.

    Keys: ``version``; ``name``; ``missing`` (stages not evaluated yet); ``layers`` (kinds); ``scored_tokens``;
    ``rows``, one per model: ``name``, ``heading``, ``loss``, ``teacher_loss``, ``perplexity``, ``perplexity_ratio``
    (to the teacher), ``kl``, ``agreement``, ``recovered``, ``tokens`` and ``seconds`` (of training, in that stage);
    ``layer_distances`` by stage; ``matrices`` by stage, one per head: ``cosine`` and ``size_ratio`` to the
    teacher's; ``memory`` by context length; ``samples`` by stage; ``versions``.
    """
    last = run.measured[-1]
    assert last.evaluation is not None
    rows = [_teacher_row(run)] if run.teacher_loss is not None else []
    return {
        "version": VERSION,
        "name": run.name,
        "missing": run.missing,
        "layers": run.layers,
        "scored_tokens": last.evaluation.metrics.tokens,
        "rows": rows + [_stage_row(run, stage, stage.evaluation.metrics) for stage in run.stages if stage.evaluation],
        "layer_distances": {s.name: list(s.evaluation.layer_distances) for s in run.stages if s.evaluation},
        "matrices": {
            stage.name: [
                {"layer": p.layer, "head": p.head, "cosine": p.cosine(), "size_ratio": p.size_ratio()}
                for p in stage.matrices
            ]
            for stage in run.stages
            if stage.matrices
        },
        "memory": run.memory
        and [
            {
                "context": tokens,
                "teacher_bytes": run.memory.teacher(tokens),
                "student_bytes": run.memory.student(tokens),
            }
            for tokens in CONTEXTS
        ],
        "samples": {
            stage.name: [vars(sample) for sample in stage.evaluation.samples]
            for stage in run.stages
            if stage.evaluation
        },
        "versions": next((stage.versions for stage in reversed(run.stages) if stage.versions), {}),
    }


def _teacher_row(run: RunRecord) -> dict[str, Any]:
    assert run.teacher_loss is not None
    return {
        "name": "teacher",
        "heading": "teacher",
        "loss": run.teacher_loss,
        "teacher_loss": run.teacher_loss,
        "perplexity": perplexity(run.teacher_loss),
        "perplexity_ratio": 1.0,
        "kl": 0.0,
        "agreement": 1.0,
        "recovered": None,
        "tokens": None,
        "seconds": None,
    }


def _stage_row(run: RunRecord, stage: Stage, metrics: Metrics) -> dict[str, Any]:
    teacher_loss = run.teacher_loss
    return {
        "name": stage.name,
        "heading": stage.heading,
        "loss": metrics.loss,
        "teacher_loss": teacher_loss,
        "perplexity": metrics.perplexity,
        "perplexity_ratio": None if teacher_loss is None else perplexity_ratio(teacher_loss, metrics.loss),
        "kl": metrics.kl,
        "agreement": metrics.agreement,
        "recovered": run.recovered(stage),
        "tokens": stage.tokens,
        "seconds": stage.seconds,
    }


@report_user_errors()
def main(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="run_dirs of recipes, finished or not.")],
    beside: Annotated[
        list[Path] | None,
        typer.Option("--with", metavar="FOLDER", help="Findings to show, the --output of a measuring program."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help=f"Folder for the files; RUN_DIR, or {SEVERAL} for several.", show_default=False)
    ] = None,
) -> None:
    """Write report.html and report.json of one run, or of several side by side."""
    if output is not None:
        require_folder(output)
    if len(run_dirs) == 1:
        page = make_report(run_dirs[0], beside or (), output)
    else:
        page = make_comparison(run_dirs, beside or (), output or SEVERAL)
    print(f"{page} ({page.stat().st_size / 1000:.0f} kB)")


if __name__ == "__main__":
    typer.run(main)
