"""Which tasks there are: this project's own, those of folders that are given, and the harness's, looked up last.

The harness's index has some 15,000 names and takes seconds of reading; a task of a folder takes none of it.
"""

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager

from distill.errors import UserError
from eval import words

TASKS = Path(__file__).parent / "tasks"


def manager_of(names: Sequence[str], folders: Sequence[Path], metadata: dict[str, Any]) -> TaskManager:
    """What makes the tasks, groups and tags called ``names``.

    Args:
        folders: searched for task files beside this project's own.
        metadata: what the tasks' own functions are given.

    Raises:
        UserError: a folder is none, or there is no such task.
    """
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"--tasks-from {folder}: there is no such folder; give one with task files (.yaml)")
    paths = [str(path) for path in (TASKS, *folders)]
    own = TaskManager(include_path=paths, include_defaults=False, metadata=metadata)
    if set(names) <= set(own.all_tasks):
        return own
    everything = TaskManager(include_path=paths, metadata=metadata)
    for name in names:
        if name not in everything.task_index:
            raise UserError(f"--task {name}: there is no such task{_nearest(name, own, everything)}")
    return everything


def _nearest(name: str, own: TaskManager, everything: TaskManager) -> str:
    near = get_close_matches(name, own.all_tasks, 3) or get_close_matches(name, everything.all_tasks, 3)
    hint = f"; did you mean {' or '.join(near)}?" if near else "."
    mine = sorted(set(own.all_tags) | {task for task in own.all_subtasks if not own.task_index[task].tags})
    return f"{hint} Local are {words.listed(mine)}; lm_eval ls tasks lists the harness's own"
