"""Tell what became of a run: RUN_DIR -> RUN_DIR/report.html and RUN_DIR/report.json.

    python -m eval.report runs/quickstart

The page is one file without scripts or links to anywhere; report.json holds its numbers. The same run makes
the same files, so a report can be compared with another one. A run that is not finished gets a report of
what there is, which says so.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from distill.atomic import replace_file
from distill.conversion import CONTEXTS
from distill.evaluation import Metrics, perplexity, perplexity_ratio
from distill.evaluation_record import json_numbers
from distill.programs import report_user_errors
from eval.page import render
from eval.run_record import RunRecord, Stage, read_run

VERSION = 1


def make_report(folder: str | Path) -> Path:
    """Write both files of the report and return the path of the page.

    Raises:
        UserError: the folder is no run directory, nothing in it is evaluated yet, or a file is damaged.
    """
    run = read_run(folder)
    numbers = report_numbers(run)
    page = render(run, numbers)
    text = json.dumps(json_numbers(numbers), indent=2, ensure_ascii=False)
    replace_file(run.folder / "report.json", f"{text}\n".encode())
    replace_file(run.folder / "report.html", page.encode())
    return run.folder / "report.html"


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
    run_dir: Annotated[Path, typer.Argument(help="The run_dir of a recipe, finished or not.", show_default=False)],
) -> None:
    """Write RUN_DIR/report.html and RUN_DIR/report.json."""
    page = make_report(run_dir)
    print(f"{page} ({page.stat().st_size / 1000:.0f} kB)")


if __name__ == "__main__":
    typer.run(main)
