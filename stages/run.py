"""Run a recipe: convert, every stage in order, and after each an evaluation; then the report.

    python -m stages.run recipes/quickstart.yaml
    python -m stages.run recipes/quickstart.yaml stages.logits.tokens=3M

What is finished is checked and skipped, and a stage that was interrupted goes on where it stopped, so running the same
command again is always right.
"""

import os
import shlex
import sys
import time
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from distill.convert_stage import convert_stage
from distill.engines import processes
from distill.run import CONVERT, Run
from distill.units import count
from eval.report import make_report, report_numbers
from eval.run_record import read_run
from eval.stage import TEACHER, evaluate_stage, evaluate_teacher
from eval.tasks import ask_after, check_tasks
from stages import hidden, logits, mixing
from stages.command import run_program

PROGRAMS: dict[str, Callable[[Run], object]] = {
    CONVERT: convert_stage,
    "mixing": mixing.main,
    "hidden": hidden.main,
    "logits": logits.main,
}


def main(run: Run) -> None:
    # Paths and prompts stand as they are, in one piece, so that a command can be copied from a log.
    console = Console(highlight=False, markup=False, soft_wrap=True, quiet=not processes.is_main())
    started = time.perf_counter()
    _announce(run, console)
    # Before anything is written: a finished stage that is not this recipe's is refused here.
    done = set(takewhile(run.is_done, run.stages))
    check_tasks(run, done)
    if not run.is_evaluated(TEACHER):
        evaluate_teacher(run)
    for stage in run.stages:
        if stage in done or run.is_done(stage):
            console.print(f"{stage}: already done")
        else:
            console.print(f"{stage}: running")
            PROGRAMS[stage](run)
        if not run.is_evaluated(stage):
            evaluate_stage(run, stage)
        ask_after(run, stage)
    processes.on_main(lambda: _report(run, console, started))


def _report(run: Run, console: Console, started: float) -> None:
    page = make_report(run.recipe.run_dir)
    console.print(summary(report_numbers(read_run(run.recipe.run_dir))))
    console.print(
        f"{time.perf_counter() - started:.0f} s in all.  report: {page}  student: {run.folder(run.stages[-1])}"
    )
    console.print(f"talk to it:  {_invitation(run)}")


def summary(numbers: dict) -> Table:
    """One row a model: teacher, after conversion, after each stage; fits 80 columns."""
    title = f"{numbers['name']}: {numbers['scored_tokens']:,} held-out tokens"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    for column in ("", "loss", "ppl", "× ppl", "KL", "top-1", "recovered", "tokens", "s"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    for row in numbers["rows"]:
        table.add_row(
            row["heading"],
            _shown(row["loss"], ".4f"),
            _shown(row["perplexity"], ".2f"),
            _shown(row["perplexity_ratio"], ".3f"),
            _shown(row["kl"], ".4f"),
            _shown(row["agreement"], ".1%"),
            _shown(row["recovered"], ".1%"),
            "" if row["tokens"] is None else count(row["tokens"]),
            _shown(row["seconds"], ".0f"),
        )
    return table


def _announce(run: Run, console: Console) -> None:
    student, n_layers = run.recipe.student, run.facts.n_layers
    kept, behind = (", ".join(map(str, layers)) for layers in (run.facts.kept, student.window_layers))
    n_mixers = n_layers - len(run.facts.kept) - len(student.window_layers)
    attention = f"attention kept in: {kept or 'none'}"
    if heads := student.keep_heads:
        attention += (
            " (single heads: " + "; ".join(f"{layer}: {', '.join(map(str, at))}" for layer, at in heads.items()) + ")"
        )
    if behind:
        attention += f", behind a window in: {behind}"
    console.print(
        f"{run.recipe.name}: {run.recipe.teacher.path} → {student.mixer} in {n_mixers} of {n_layers} layers, "
        f"{attention}; everything goes to {run.recipe.run_dir}"
    )


def _invitation(run: Run) -> str:
    """A command that a shell understands, whatever stands in the prompt."""
    return shlex.join([_command(), "generate", str(run.folder(run.stages[-1])), _example_prompt(run)])


def _command() -> str:
    """How to call the ``distill`` command of this very environment, activated or not."""
    return os.path.relpath(Path(sys.executable).with_name("distill"))


def _example_prompt(run: Run) -> str:
    return next(iter(run.recipe.evaluation.prompts), "Once upon a time")


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


if __name__ == "__main__":
    run_program(main, "Run a recipe from the teacher to the evaluated student; run it again to continue.")
