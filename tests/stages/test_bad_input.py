"""Every mistake ends with exit code 2 and one screen of text, and leaves what was there as it was.

What may be wrong with a predecessor's folder is in test_stage_programs.py, a disk that fills up in test_full_disk.py.
"""

import shutil
from pathlib import Path

import pytest

from tests.stages.conftest import write_recipe
from tests.stages.mistakes import MISTAKES, Mistake
from tests.stages.program import Ended, fresh, require_refused, run
from tests.stages.run_folder import contents

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path, saved_teacher, text) -> Path:
    """Recipe, teacher and text of one's own, for a mistake to be made in."""
    shutil.copytree(saved_teacher, tmp_path / "teacher")
    shutil.copytree(text, tmp_path / "text")
    write_recipe(tmp_path, tmp_path / "teacher", tmp_path / "text")
    return tmp_path


def make(mistake: Mistake, folder: Path) -> Ended:
    """Make it, and run the recipe; nothing in the folder may change by that."""
    mistake.harm(folder)
    before = contents(folder)
    ended = run("stages.run", folder / "tiny.yaml", *mistake.settings_in(folder))
    assert contents(folder) == before
    return ended


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_and_nothing_is_written(folder, name):
    require_refused(make(MISTAKES[name], folder), *MISTAKES[name].said)


@pytest.mark.parametrize("name", [name for name in MISTAKES if not name.startswith("somebody")])
def test_a_mistake_costs_a_finished_run_nothing(folder, whole, name):
    shutil.copytree(whole[0], folder / "run")
    require_refused(make(MISTAKES[name], folder))


def test_no_recipe(folder):
    (folder / "tiny.yaml").rename(folder / "tinny.yaml")
    require_refused(run("stages.run", folder / "tiny.yaml"), "no such file, did you mean", "tinny.yaml")


def test_a_tracker_that_is_not_installed(folder):
    """A package of its name that cannot be imported stands in front of the real one."""
    (folder / "shim" / "tensorboard").mkdir(parents=True)
    (folder / "shim" / "tensorboard" / "__init__.py").write_text("raise ModuleNotFoundError('no such module')")
    before = contents(folder)
    shim = {"PYTHONPATH": str(folder / "shim"), "PYTHONDONTWRITEBYTECODE": "1"}
    ended = fresh("stages.run", folder / "tiny.yaml", "trackers=[tensorboard]", environment=shim)
    require_refused(ended, "trackers: tracker 'tensorboard' is not installed", "pip install 'distill-ssm[tensorboard]'")
    assert contents(folder) == before
