"""A recipe's tasks that are asked after a stage: the student beside its teacher, into RUN_DIR/evaluations/KIND.json.

``stages.run`` calls ``check_tasks`` before anything runs, and ``ask_after`` after every stage. What was asked of these
very weights before is not asked again. How a kind of task is measured stands in KINDS alone.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from distill.atomic import replace_file
from distill.engines import processes
from distill.recipe_evaluation import Task
from distill.run import Run
from distill.training import checkpoint
from eval.findings import Findings, read_findings, write_findings
from eval.gathered import EVALUATIONS
from eval.measured import TEACHER, Answers, Asking, harness_asking, recall_asking

KINDS: dict[str, Callable[[Run, Any], Asking]] = {"recall": recall_asking, "harness": harness_asking}
"""How each kind of task is measured (``eval.measured``)."""


def check_tasks(run: Run, done: Collection[str] = ()) -> None:
    """Prepare every task that is still to be asked after a stage, so that its mistakes show before anything runs.

    Args:
        done: stages that are finished.

    Raises:
        UserError: there is no such task, what it needs is not installed, or it has no examples of that length.
    """
    due = [task for task in run.recipe.evaluation.tasks if moments(run, task) - set(done)]
    with _generators_kept():
        processes.together(lambda: [_prepared(run, task) for task in due])


def ask_after(run: Run, stage: str) -> None:
    """Ask the stage's student, and first the teacher, what the recipe says; all processes call it, the main one writes.

    Raises:
        UserError: a task has no examples of that length, or the model cannot read them.
    """
    due = [task for task in run.recipe.evaluation.tasks if stage in moments(run, task)]
    for kind in KINDS:
        for model in (TEACHER, stage):
            left = [
                one for one in due if one.kind == kind and not processes.on_main(partial(_is_asked, run, one, model))
            ]
            if left:
                _ask(run, model, left)


def moments(run: Run, task: Task) -> set[str]:
    """The stages after which a task is asked."""
    return {run.stages[-1] if stage == "end" else stage for stage in task.after or ()}


def _prepared(run: Run, task: Task) -> Asking:
    return KINDS[task.kind](run, task)


def _ask(run: Run, name: str, tasks: list[Task]) -> None:
    """One model, loaded once for all tasks of one kind."""
    with _generators_kept():
        askings = processes.together(lambda: [_prepared(run, task) for task in tasks])
        model = askings[0].load(run, name)
        for task, asking in zip(tasks, askings, strict=True):
            answers = asking.ask(model)
            processes.on_main(partial(_add, run, task, name, answers))


@contextmanager
def _generators_kept() -> Iterator[None]:
    """What is drawn afterwards is as without the tasks; the harness seeds every generator anew."""
    generators = checkpoint.rng_state()
    try:
        yield
    finally:
        checkpoint.set_rng_state(generators)


def _add(run: Run, task: Task, name: str, answers: Answers) -> None:
    """Write what was found, then that it was: a kill between the two asks once more."""
    folder, kind = _folder(run), task.kind
    path = folder / f"{kind}.json"
    before = read_findings(path).results if path.is_file() else {}
    tasks = [one for one in run.recipe.evaluation.tasks if one.after and one.kind == kind]
    found: dict[str, dict[str, Any]] = {}
    for one in tasks:
        found |= {label: by_model for label, by_model in before.items() if _belongs(label, one)}
        if one is task:
            for part, answer in answers.items():
                label = f"{one.name}: {part}" if part else one.name
                found[label] = found.get(label, {}) | {name: answer}
    ordered = {label: _in_order(run, by_model) for label, by_model in found.items()}
    results = {label: by_model for label, by_model in ordered.items() if by_model}
    named = _in_order(run, {model: None for by_model in results.values() for model in by_model})
    models = {model: run.recipe.teacher.path if model == TEACHER else str(run.folder(model)) for model in named}
    settings = {"tasks": [_settings(one) for one in tasks]}
    write_findings(folder, Findings(kind, models, settings, results))
    asked = _asked(run, kind) | {f"{task.name}/{name}": _subject(run, task, name)}
    replace_file(_record(run, kind), json.dumps(asked, indent=1).encode())


def _belongs(label: str, task: Task) -> bool:
    """Whether results are this task's: called as it, or as one of its parts (names have no colon)."""
    return label.partition(": ")[0] == task.name


def _in_order(run: Run, by_model: dict[str, Any]) -> dict[str, Any]:
    """Teacher first, then the students as they were made; what another recipe had here is left out."""
    return {name: by_model[name] for name in (TEACHER, *run.stages) if name in by_model}


def _is_asked(run: Run, task: Task, name: str) -> bool:
    return _asked(run, task.kind).get(f"{task.name}/{name}") == _subject(run, task, name)


def _subject(run: Run, task: Task, name: str) -> str:
    """A digest of the task's wishes and of who is asked."""
    told = [run.evaluation_subject(name), json.dumps(_settings(task), sort_keys=True)]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()


def _settings(task: Task) -> dict[str, Any]:
    return task.model_dump(mode="json", exclude={"every", "after", "batch_size"})


def _asked(run: Run, kind: str) -> dict[str, str]:
    path = _record(run, kind)
    if not path.is_file() or not (_folder(run) / f"{kind}.json").is_file():
        return {}
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _record(run: Run, kind: str) -> Path:
    """Beside KIND.json: of each task and model, a digest of what was asked of whom."""
    return _folder(run) / f"{kind}.asked"


def _folder(run: Run) -> Path:
    return run.recipe.run_dir / EVALUATIONS
