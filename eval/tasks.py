"""A recipe's tasks that are asked after a stage: the student beside its teacher, into RUN_DIR/evaluations/recall.json.

``stages.run`` calls it after every stage. What was asked of these very weights before is not asked again.
"""

import hashlib
import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from distill.atomic import replace_file
from distill.engines import processes
from distill.engines.placement import place_student
from distill.recall.asked import examples_of
from distill.recall.sweep import cells_of
from distill.recipe_evaluation import RecallTask
from distill.run import Run
from eval.findings import Findings, read_findings, write_findings
from eval.gathered import EVALUATIONS
from eval.recall import KIND

TEACHER = "teacher"
ASKED = "recall.asked"
"""Beside recall.json: of each task and model, a digest of what was asked of whom."""


def ask_after(run: Run, stage: str) -> None:
    """Ask the stage's student, and first the teacher, what the recipe says; all processes call it, the main one writes.

    Raises:
        UserError: a task has no examples of that length, or the model cannot read them.
    """
    due = [task for task in run.recipe.evaluation.tasks if stage in moments(run, task)]
    for model in (TEACHER, stage):
        left = [task for task in due if not processes.on_main(partial(_is_asked, run, task, model))]
        if left:
            _ask(run, model, left)


def moments(run: Run, task: RecallTask) -> set[str]:
    """The stages after which a task is asked."""
    return {run.stages[-1] if stage == "end" else stage for stage in task.after or ()}


def _ask(run: Run, name: str, tasks: list[RecallTask]) -> None:
    """One model, loaded once."""
    vocabulary = run.facts.config.get_text_config().vocab_size
    examples = [examples_of(task, run.tokenizer, vocabulary) for task in tasks]
    model = _model(run, name)
    for task, drawn in zip(tasks, examples, strict=True):
        cells = [asdict(cell) for cell in cells_of(model, drawn, task.batch_size)]
        processes.on_main(partial(_add, run, task, name, cells))


def _model(run: Run, name: str) -> PreTrainedModel:
    if name == TEACHER:
        return run.teacher
    return place_student(run.folder(name), run.launched, run.device, frozen=True)


def _add(run: Run, task: RecallTask, name: str, cells: list[dict[str, Any]]) -> None:
    """Write what was found, then that it was: a kill between the two asks once more."""
    folder = _folder(run)
    path = folder / f"{KIND}.json"
    before = read_findings(path).results if path.is_file() else {}
    wanted = [one.name for one in run.recipe.evaluation.tasks if one.after]
    kept = {one: before.get(one, {}) for one in wanted}
    kept[task.name] = _in_order(run, kept[task.name] | {name: cells})
    results = {one: by_model for one, by_model in kept.items() if by_model}
    named = _in_order(run, {model: None for by_model in results.values() for model in by_model})
    models = {model: run.recipe.teacher.path if model == TEACHER else str(run.folder(model)) for model in named}
    settings = {"tasks": [_settings(one) for one in run.recipe.evaluation.tasks if one.after]}
    write_findings(folder, Findings(KIND, models, settings, results))
    asked = _asked(folder) | {f"{task.name}/{name}": _subject(run, task, name)}
    replace_file(folder / ASKED, json.dumps(asked, indent=1).encode())


def _in_order(run: Run, by_model: dict[str, Any]) -> dict[str, Any]:
    """Teacher first, then the students as they were made; what another recipe had here is left out."""
    return {name: by_model[name] for name in (TEACHER, *run.stages) if name in by_model}


def _is_asked(run: Run, task: RecallTask, name: str) -> bool:
    return _asked(_folder(run)).get(f"{task.name}/{name}") == _subject(run, task, name)


def _subject(run: Run, task: RecallTask, name: str) -> str:
    """A digest of the task's wishes and of who is asked."""
    told = [run.evaluation_subject(name), json.dumps(_settings(task), sort_keys=True)]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()


def _settings(task: RecallTask) -> dict[str, Any]:
    return task.model_dump(mode="json", exclude={"every", "after", "batch_size"})


def _asked(folder: Path) -> dict[str, str]:
    path = folder / ASKED
    if not path.is_file() or not (folder / f"{KIND}.json").is_file():
        return {}
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _folder(run: Run) -> Path:
    return run.recipe.run_dir / EVALUATIONS
