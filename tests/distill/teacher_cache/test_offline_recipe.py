"""What a recipe may say about an offline teacher."""

from pathlib import Path

import pytest

from distill.errors import UserError
from distill.recipe import OfflineTeacher, Recipe, load_recipe
from distill.teacher_cache import LARGEST_K


@pytest.fixture
def path(tmp_path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text("teacher: {path: t}\ndata: {source: s}\nstages:\n  hidden: {tokens: 1M}\n  logits: {tokens: 1M}\n")
    return path


def offline_teacher(recipe: Recipe) -> OfflineTeacher | None:
    assert recipe.stages.logits is not None
    return recipe.stages.logits.offline_teacher


def test_the_teacher_runs_unless_asked_otherwise(path):
    assert offline_teacher(load_recipe(path)) is None
    assert offline_teacher(load_recipe(path, ["stages.logits.offline_teacher={}"])) == OfflineTeacher(top_k=64)
    assert offline_teacher(load_recipe(path, ["stages.logits.offline_teacher.top_k=8"])) == OfflineTeacher(top_k=8)


def test_it_changes_what_the_logits_stage_ends_with_and_nothing_before(path):
    recipes = [load_recipe(path, [f"stages.logits.offline_teacher={value}"]) for value in ("null", "{}", "{top_k: 65}")]
    assert len({recipe.stage_digest("logits") for recipe in recipes}) == 3
    assert len({recipe.stage_digest("hidden") for recipe in recipes}) == 1


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("offline_teacher={top_k: 0}", "must be greater than or equal to 1, not 0"),
        (f"offline_teacher={{top_k: {LARGEST_K + 1}}}", f"must be less than or equal to {LARGEST_K}"),
        ("offline_teacher={topk: 64}", "unknown key, did you mean 'top_k'?"),
        ("offline_teacher=64", "offline_teacher: must be a"),
    ],
)
def test_what_cannot_be_is_refused(path, said, message):
    with pytest.raises(UserError) as refusal:
        load_recipe(path, [f"stages.logits.{said}"])
    assert message in str(refusal.value)


def test_another_temperature_is_refused_with_the_reason(path):
    load_recipe(path, ["stages.logits.temperature=2"])
    with pytest.raises(UserError, match=r"needs temperature: 1, not 2: .* cannot be known"):
        load_recipe(path, ["stages.logits.temperature=2", "stages.logits.offline_teacher={}"])
