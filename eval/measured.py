"""How each kind of a recipe's tasks is measured after a stage: what is prepared, which model it asks, and how.

Preparing raises what is wrong with a task, and loads no model. The harness is imported only for a task of its kind.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from distill.engines import processes
from distill.engines.placement import place_student
from distill.errors import UserError
from distill.recall.asked import examples_of
from distill.recall.sweep import cells_of
from distill.recipe_evaluation import HarnessTask, RecallTask
from distill.run import Run
from eval.harness.installed import require_harness

TEACHER = "teacher"
Answers = Mapping[str, Any]
"""JSON by the parts of a task; a task without parts has one called ""."""


@dataclass(frozen=True)
class Asking:
    """One task, ready to be asked.

    Attributes:
        load: the teacher, or a stage's student, as this kind wants it; every process calls it.
        ask: what was found of such a model; every process calls it, the main one's answer counts.
    """

    load: Callable[[Run, str], Any]
    ask: Callable[[Any], Answers]


def recall_asking(run: Run, task: RecallTask) -> Asking:
    """Cells, as eval.recall has them."""
    vocabulary = run.facts.config.get_text_config().vocab_size
    drawn = examples_of(task, run.tokenizer, vocabulary)
    return Asking(placed, lambda model: {"": [asdict(cell) for cell in cells_of(model, drawn, task.batch_size)]})


def placed(run: Run, name: str) -> PreTrainedModel:
    """As the run's engine places its models."""
    if name == TEACHER:
        return run.teacher
    return place_student(run.folder(name), run.launched, run.device, frozen=True)


def harness_asking(run: Run, task: HarnessTask) -> Asking:
    """A score a subtask, as eval.harness has them."""
    said = f"evaluation.tasks: {{kind: harness, task: {task.task}}}"
    try:
        require_harness()
    except UserError as error:
        raise UserError(f"{said}: {error}") from error
    positions = getattr(run.facts.config.get_text_config(), "max_position_embeddings", None)
    _require_room(positions, task.length or 0, f"{said}: length: {task.length}")
    from eval.harness.names import manager_of
    from eval.harness.scores import require_data, scores, writes

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # as in eval.harness
    given = task.drawn_from() | {"tokenizer": run.recipe.teacher.path}
    asked_by = ("evaluation.tasks: task", "evaluation.tasks: tasks_from")
    manager = manager_of([task.task], [Path(one) for one in task.tasks_from], given, asked_by=asked_by)
    for name, one in require_data([task.task], manager, asked_by=asked_by[0]).items():
        _require_room(positions, writes(one) + 1, f"{said}: {name} has a model write {writes(one)} tokens")

    def ask(lm: Any) -> Answers:
        lm.batch_size_per_gpu = task.batch_size
        found = scores(lm, [task.task], manager, task.limit) or {}
        return {"" if name == task.task else name: asdict(score) for name, score in found.items()}

    return Asking(_whole, ask)


def _whole(run: Run, name: str) -> Any:
    """Each process loads the whole model from its folder, as eval.harness does, and answers its part of requests."""
    from eval.harness.model import DistillLM

    # One model at a time. The next who wants the run's teacher loads it anew.
    run.forget_teacher()
    wanted, device = run.recipe.teacher, run.device.type
    path, dtype = (wanted.path, wanted.dtype) if name == TEACHER else (str(run.folder(name)), "auto")
    return processes.together(partial(DistillLM, path, device=device, dtype=dtype))


def _require_room(positions: int | None, tokens: int, said: str) -> None:
    """The harness itself would cut the beginnings of longer prompts, where the answers may stand, or fail."""
    if positions is not None and tokens > positions:
        raise UserError(f"{said}, but the teacher has only {positions} positions; choose less, or another task")
