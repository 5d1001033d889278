"""Every recipe that is shipped loads, says what it means, and passes all checks where its teacher is at hand."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from distill.checks import check
from distill.recipe import load_recipe
from scripts.recall_rows import VOCABULARY, write_text
from tests.conftest import CHECKOUT, outside

SHAPES = sorted((CHECKOUT / "recipes" / "shapes").glob("*.yaml"))
PUBLISHED = sorted((CHECKOUT / "recipes" / "published").glob("*.yaml"))
TEACHERS = sorted((CHECKOUT / "recipes" / "teachers").glob("*.yaml"))
RECIPES = [*sorted((CHECKOUT / "recipes").glob("*.yaml")), *PUBLISHED, *SHAPES, *TEACHERS]
LAUNCH = sorted((CHECKOUT / "recipes" / "launch").glob("*.yaml"))


def test_all_are_found():
    assert {path.stem for path in RECIPES} >= {"quickstart", "stories260k"}
    assert LAUNCH
    assert not list((CHECKOUT / "recipes").rglob("*.py"))


def named(path: Path) -> str:
    return str(path.relative_to(CHECKOUT / "recipes").with_suffix(""))


@pytest.mark.parametrize("path", RECIPES, ids=named)
def test_a_recipe_loads_and_dumps_to_itself(path, tmp_path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    again = tmp_path / path.name
    again.write_text(recipe.dump())
    assert load_recipe(again) == recipe


@pytest.mark.parametrize("path", RECIPES, ids=named)
def test_a_recipe_passes_its_checks(path, tmp_path, monkeypatch):
    monkeypatch.chdir(CHECKOUT)
    changes = [f"run_dir={tmp_path / 'run'}"]
    if load_recipe(path).data.source == ("runs/recall-teacher/rows.txt",):
        write_text(tmp_path / "rows.txt", 1000, VOCABULARY, seed=0)
        changes.append(f"data.source={tmp_path / 'rows.txt'}")
    if path in TEACHERS:
        changes.append(f"teacher.path=recipes/shapes/{path.stem}")
    recipe = load_recipe(path, changes)
    for place in (recipe.teacher.path, *recipe.data.source):
        if place.startswith("../shared/"):
            outside(place.removeprefix("../shared/"))
    # A shape has nothing but the config of its teacher: it can be planned, and not run.
    facts = check(recipe, planning=path in SHAPES + TEACHERS)
    assert facts.steps.keys() == recipe.stages.named().keys()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("path", LAUNCH, ids=lambda path: path.stem)
def test_a_launch_config_says_when_to_use_it_and_is_accelerates(path: Path):
    assert path.read_text().startswith("# ")
    assert load_config_from_file(str(path)) is not None
