"""A recipe's evaluations: which there are, when they run, what is decided by them, and every mistake by its line."""

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest

from distill.errors import UserError
from distill.recall import TASKS
from distill.recipe import STAGE_NAMES, Recipe, load_recipe
from distill.recipe_evaluation import After, RecallTask

RECIPE = """\
teacher: {path: t}
data: {source: s}
stages:
  hidden: {tokens: 300K, eval_every: 5}
  logits:
    tokens: 1.5M
evaluation:
  tasks:
    - {kind: recall, task: phonebook, items: [4, 8], lengths: [128], every: 200}
    - {task: copying, after: [hidden, end]}
    - {task: phonebook, after: end}
"""


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Recipe]:
    def _load(*overrides: str, add: str = "") -> Recipe:
        path = tmp_path / "small.yaml"
        path.write_text(RECIPE + add)
        return load_recipe(path, overrides)

    return _load


def test_names_are_those_of_the_library():
    assert set(get_args(RecallTask.model_fields["task"].annotation)) == set(TASKS)
    assert get_args(After) == ("convert", *STAGE_NAMES, "end")


def test_tasks_and_their_metrics(load):
    recipe = load()
    book, copying, _ = recipe.evaluation.tasks
    assert (book.name, book.items, book.lengths, book.every, book.after) == ("phonebook", (4, 8), (128,), 200, None)
    assert copying.after == ("hidden", "end")
    assert recipe.measured_in("logits") == dict.fromkeys(book.metrics(), 200)
    assert list(recipe.measured_in("hidden")) == ["loss", "kl", "agreement", *book.metrics()]
    assert recipe.measured_in("hidden")["kl"] == 5
    offline = load("stages.logits.offline_teacher={}", "stages.logits.eval_every=7")
    assert list(offline.measured_in("logits")) == ["loss", *book.metrics()]


@pytest.mark.parametrize(("metric", "mode"), [("loss", "min"), ("kl", "min"), ("recall.phonebook.written", "max")])
def test_what_is_better_follows_the_metric(load, metric, mode):
    recipe = load(f"stages.hidden.keep_best={{metric: {metric}}}")
    assert recipe.stages.hidden.keep_best.mode == mode
    recipe = load(f"stages.hidden.stop_early={{metric: {metric}, mode: max, patience: 2}}")
    assert recipe.stages.hidden.stop_early.mode == "max"


@pytest.mark.parametrize(
    ("add", "said"),
    [
        ("    - {task: phonebok, after: end}", "12: evaluation.tasks[3].task: must be one of associative, phonebook"),
        ("    - {task: parity, evry: 3}", "12: evaluation.tasks[3].evry: unknown key, did you mean 'every'?"),
        ("    - {task: parity}", "12: evaluation.tasks[3]: says not when it runs; give every"),
        ("    - {task: parity, after: logit}", "12: evaluation.tasks[3].after: must be one of convert, mixing"),
        ("    - {task: parity, after: mixing}", "must be one of convert, hidden, logits, end, not 'mixing'"),
        ("    - {task: phonebook, every: 3}", "12: evaluation.tasks[3]: is another task's name"),
        ("    - {task: parity, items: [], after: end}", "12: evaluation.tasks[3].items: must name at least one"),
    ],
)
def test_a_task_that_cannot_be(load, add, said):
    with pytest.raises(UserError, match=r"small\.yaml:") as error:
        load(add=add)
    assert said in str(error.value).replace("small.yaml:", "")
    assert len(str(error.value).splitlines()) == 1


def test_another_name_makes_room_for_another_such_task(load):
    recipe = load(add="    - {task: phonebook, name: long-book, lengths: [900], every: 100}")
    assert "recall.long-book.written" in recipe.measured_in("logits")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stages.hidden.keep_best={metric: klx}", "stages.hidden.keep_best.metric: is not measured while this stage"),
        ("stages.hidden.keep_best={metric: klx}", "did you mean 'kl'? (measured: loss, kl, agreement, recall.phone"),
        ("stages.logits.keep_best={metric: kl}", "give stages.logits.eval_every (measured: recall.phonebook.written"),
        ("stages.logits.stop_early={metric: recall.copying.written, patience: 2}", "is not measured while this stage"),
        ("stages.logits.stop_early={metric: kl}", "stages.logits.stop_early.patience: missing"),
        ("stages.hidden.keep_best={metric: kl, mode: low}", "keep_best.mode: must be one of min, max, not 'low'"),
    ],
)
def test_a_metric_that_nobody_measures(load, override, said):
    with pytest.raises(UserError) as error:
        load(override)
    assert said in str(error.value)


def test_a_metric_of_the_file_is_told_with_its_line(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(
        RECIPE.replace("tokens: 1.5M\n", "tokens: 1.5M\n    keep_best:\n      metric: recall.fonebook.written\n")
    )
    with pytest.raises(UserError, match=r"small\.yaml:8: .*did you mean 'recall\.phonebook\.written'"):
        load_recipe(path)


def test_digests_know_what_decides_and_nothing_else(load):
    plain = load()
    for harmless in ("stages.hidden.eval_every=9", "evaluation.tasks=[]", "evaluation.tokens=1K"):
        assert load(harmless).stage_digest("logits") == plain.stage_digest("logits")
    chosen = "stages.logits.keep_best={metric: recall.phonebook.written}"
    digest = load(chosen).stage_digest("logits")
    assert digest != plain.stage_digest("logits")
    assert load(chosen).stage_digest("hidden") == plain.stage_digest("hidden")
    task = "evaluation.tasks=[{{task: phonebook, items: [4, 8], lengths: [128], every: {}, samples: {}}}]"
    assert load(chosen, task.format(200, 64)).stage_digest("logits") == digest
    for other in (task.format(100, 64), task.format(200, 32)):
        assert load(chosen, other).stage_digest("logits") != digest
    assert load(chosen, "stages.logits.eval_every=9", "evaluation.tokens=1K").stage_digest("logits") == digest
    by_kl = "stages.hidden.stop_early={metric: kl, patience: 2}"
    digests = {load(by_kl, more).stage_digest("hidden") for more in ("seed=0", "stages.hidden.eval_every=9")}
    assert len({*digests, load(by_kl, "evaluation.tokens=1K").stage_digest("hidden")}) == 3


def test_recipes_of_before_keep_their_digests(tmp_path):
    """So that a finished run is still known after this was added."""
    path = tmp_path / "small.yaml"
    path.write_text("teacher: {path: t}\ndata: {source: s}\nstages: {logits: {tokens: 1K}}\n")
    recipe = load_recipe(path)
    content = recipe._content(("logits",))
    assert "tasks" not in content["evaluation"]
    assert not {"keep_best", "stop_early"} & content["stages"]["logits"].keys()


def test_a_dumped_recipe_is_the_same(load, tmp_path):
    recipe = load(
        "stages.hidden.keep_best={metric: kl}",
        "stages.logits.stop_early={metric: recall.phonebook.chosen, patience: 2}",
    )
    (tmp_path / "again.yaml").write_text(recipe.dump())
    assert load_recipe(tmp_path / "again.yaml") == recipe
