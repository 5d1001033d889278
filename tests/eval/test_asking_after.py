"""A recipe's tasks after stages: who is asked what, that nobody is asked twice, and what the report makes of it."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from distill import convert
from distill.errors import UserError
from distill.recipe import Recipe
from eval import tasks
from eval.findings import read_findings
from eval.gathered import section_of
from tests.conftest import SHAPE

TASKS = [
    {"task": "copying", "surface": "ids", "items": [2], "samples": 3, "after": ["hidden", "end"]},
    {"task": "associative", "surface": "ids", "items": [3], "samples": 3, "after": "end"},
    {"task": "parity", "surface": "ids", "every": 5},
]


def recipe(folder: Path, asked: list[dict]) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "r",
            "run_dir": str(folder),
            "teacher": {"path": "t"},
            "data": {"source": "s"},
            "stages": {"hidden": {"tokens": 1000}, "logits": {"tokens": 1000}},
            "evaluation": {"tasks": asked},
        }
    )


@pytest.fixture
def run(tmp_path, monkeypatch):
    """What ``ask_after`` reads of a run; the student of every stage is the same one."""
    torch.manual_seed(0)
    teacher = LlamaForCausalLM(LlamaConfig(**SHAPE | {"vocab_size": 320})).eval()
    student = convert(teacher, keep_attention=[1])
    loaded: list[str] = []

    def model(run, name):
        loaded.append(name)
        return teacher if name == "teacher" else student

    monkeypatch.setattr(tasks, "_model", model)
    return SimpleNamespace(
        recipe=recipe(tmp_path, TASKS),
        stages=["convert", "hidden", "logits"],
        facts=SimpleNamespace(config=teacher.config),
        tokenizer=None,
        folder=lambda stage: tmp_path / stage,
        evaluation_subject=lambda name: f"weights of {name}",
        loaded=loaded,
    )


def found(run):
    return read_findings(run.recipe.run_dir / "evaluations" / "recall.json")


def test_each_is_asked_when_the_recipe_says(run):
    tasks.ask_after(run, "convert")
    assert not (run.recipe.run_dir / "evaluations").exists()
    tasks.ask_after(run, "hidden")
    assert run.loaded == ["teacher", "hidden"]
    assert {task: list(by_model) for task, by_model in found(run).results.items()} == {"copying": ["teacher", "hidden"]}
    tasks.ask_after(run, "logits")
    assert run.loaded == ["teacher", "hidden", "teacher", "logits"]
    assert {task: list(by_model) for task, by_model in found(run).results.items()} == {
        "copying": ["teacher", "hidden", "logits"],
        "associative": ["teacher", "logits"],
    }
    assert list(found(run).models) == ["teacher", "hidden", "logits"]
    section = section_of(found(run))
    assert [score.task for score in section.scores] == ["recall: copying", "recall: associative"]


def test_nobody_is_asked_twice_but_for_a_change(run):
    tasks.ask_after(run, "hidden")
    before = (run.recipe.run_dir / "evaluations" / "recall.json").read_bytes()
    tasks.ask_after(run, "hidden")
    assert run.loaded == ["teacher", "hidden"]
    assert (run.recipe.run_dir / "evaluations" / "recall.json").read_bytes() == before

    run.evaluation_subject = lambda name: f"weights of {name}" + " anew" * (name == "hidden")
    tasks.ask_after(run, "hidden")
    assert run.loaded == ["teacher", "hidden", "hidden"]

    run.recipe = recipe(run.recipe.run_dir, [TASKS[0] | {"seed": 9}])
    tasks.ask_after(run, "hidden")
    assert run.loaded[3:] == ["teacher", "hidden"]

    (run.recipe.run_dir / "evaluations" / "recall.asked").unlink()  # as a kill between the two files leaves it
    tasks.ask_after(run, "hidden")
    assert run.loaded[5:] == ["teacher", "hidden"]


def test_what_the_recipe_no_longer_asks_is_left_out(run):
    tasks.ask_after(run, "logits")
    run.recipe = recipe(run.recipe.run_dir, [TASKS[0] | {"samples": 2}])
    tasks.ask_after(run, "logits")
    assert list(found(run).results) == ["copying"]
    assert json.loads(json.dumps(found(run).settings))["tasks"][0]["samples"] == 2


def test_a_task_without_examples_is_told(run):
    run.recipe = recipe(run.recipe.run_dir, [TASKS[0] | {"items": [40], "lengths": [8]}])
    with pytest.raises(UserError, match="the length is 8"):
        tasks.ask_after(run, "logits")
    assert run.loaded == [], "before a model was loaded"
