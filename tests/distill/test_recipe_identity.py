"""A recipe written out is the same recipe, and its digests change with its results and with nothing else."""

import random
import re
from pathlib import Path

import pytest
import yaml

from distill.recipe import STAGE_NAMES, Recipe, load_recipe

SMALL = """\
teacher: {path: teachers/tiny}
data: {source: python-stdlib}
stages:
  hidden: {tokens: 300K}
  logits: {tokens: 1.5M}
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL, encoding="utf-8")
    return path


def random_recipe(rng: random.Random) -> dict:
    """A valid recipe with about half of its keys given, in values YAML could mistake for something else."""

    def some(settings: dict) -> dict:
        return {key: value for key, value in settings.items() if rng.random() < 0.5}

    def stage(**own: object) -> dict:
        settings = {
            "batch_size": rng.randint(1, 64),
            "micro_batch_size": rng.choice([None, 3]),
            "lr": 10 ** rng.uniform(-9, 0),
            "mixer_lr": 10 ** rng.uniform(-9, 20),
            "schedule": rng.choice(["wsd", "cosine", "constant"]),
            "warmup": rng.choice([0, 1e-5, 0.5]),
            "betas": [rng.random(), 0],
            "clip": rng.choice([None, 1, 1e-7]),
            "eval_every": rng.choice([None, 5]),
            **own,
        }
        return {"tokens": rng.choice([123, "10K", "0.001B"]), **some(settings)}

    words = ["no", "on", "1e-4", "12:30", "2024-01-01", "null", "~", "007", "1_0", "a: b", "# x", "é\n", " ", "<<", "="]
    stages = {
        "mixing": stage(parallel="layers"),
        "hidden": stage(target="block", train=["norms", "mixer"]),
        "logits": stage(divergence="jsd", temperature=2, ce_weight=1e-3, gradient_checkpointing=True, train=["head"]),
    }
    chosen = some(stages) or {"logits": stages["logits"]}
    keep = [[1, 0], {"pattern": rng.choice(["ma", "1e-4"])}, {"ratio": 1e-5}, {"count": 0}, {"layers": []}]
    if "target" not in chosen.get("hidden", {}):
        chosen.get("hidden", {}).pop("train", None)
    return {
        "name": rng.choice(["007", "1e-4", "no", "null", "a.b-c"]),
        "teacher": {"path": rng.choice(words)},
        "data": {"source": rng.choice([rng.choice(words), ["b", "on"]]), **some({"separator": rng.choice(words)})},
        "stages": chosen,
        **some(
            {
                "run_dir": rng.choice(words),
                "seed": 2**32 - 1,
                "student": {"keep_attention": rng.choice(keep)},
                "evaluation": {"prompts": rng.sample(words, 3)},
                "trackers": ["tensorboard"],
            }
        ),
    }


def test_a_dumped_recipe_loads_back_to_an_equal_one(tmp_path: Path) -> None:
    rng = random.Random(0)
    for _ in range(60):
        recipe = Recipe.model_validate(random_recipe(rng))
        dumped = recipe.dump()
        (tmp_path / "another_name.yaml").write_text(dumped, encoding="utf-8")
        again = load_recipe(tmp_path / "another_name.yaml")
        assert again == recipe
        assert again.dump() == dumped
        assert again.digest() == recipe.digest()
        # Other YAML readers see the same recipe.
        assert Recipe.model_validate(yaml.safe_load(dumped)) == recipe


@pytest.mark.parametrize(
    "override",
    [
        "name=x",
        "run_dir=elsewhere",
        "device=cpu",
        "trackers=[tensorboard]",
        "student.exportable=granite",
        "stages.logits.checkpoint_every=3",
        "stages.logits.eval_every=3",
        "stages.hidden.keep_checkpoints=5",
        "stages.hidden.micro_batch_size=1",
        "stages.hidden.parallel=layers",
        "stages.logits.gradient_checkpointing=true",
    ],
)
def test_digest_ignores_what_changes_no_result(small: Path, override: str) -> None:
    before, after = load_recipe(small), load_recipe(small, [override])
    assert before != after
    assert before.digest() == after.digest()
    assert before.stage_digest("logits") == after.stage_digest("logits")


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("student.state_dim=64", {"convert", *STAGE_NAMES}),
        ("student.calibrate={tokens: 64K}", {"convert", *STAGE_NAMES}),
        ("data.training_only=written.jsonl", {"convert", *STAGE_NAMES}),
        ("seed=1", {"convert", *STAGE_NAMES}),
        ("dtype=bfloat16", {"convert", *STAGE_NAMES}),
        ("teacher.path=other", {"convert", *STAGE_NAMES}),
        ("student.keep_attention=[1]", {"convert", *STAGE_NAMES}),
        ("student.window_layers=[1]", {"convert", *STAGE_NAMES}),
        ("data.block=128", {"convert", *STAGE_NAMES}),
        ("data.held_out.fraction=0.2", {"convert", *STAGE_NAMES}),
        ("stages.mixing.lr=1e-4", set(STAGE_NAMES)),
        ("stages.mixing=null", set(STAGE_NAMES)),
        ("stages.hidden.lr=1e-4", {"hidden", "logits"}),
        ("stages.hidden.block=64", {"hidden", "logits"}),
        ("stages.logits.stepwise={at: [0.0, 0.5]}", {"logits"}),
        ("stages.logits.lr=1e-4", {"logits"}),
        ("stages.logits.batch_size=3", {"logits"}),
        ("stages.logits=null", {"logits"}),
        ("evaluation.tokens=1K", set()),
    ],
)
def test_a_stage_digest_covers_the_stage_and_what_comes_before(small: Path, override: str, changed: set[str]) -> None:
    base = ["stages.mixing.tokens=1K"]
    before, after = load_recipe(small, base), load_recipe(small, [*base, override])
    assert {
        name for name in ("convert", *STAGE_NAMES) if before.stage_digest(name) != after.stage_digest(name)
    } == changed
    assert before.digest() != after.digest()


def test_keys_that_came_later_are_in_no_digest_until_they_are_given(small: Path) -> None:
    """So that runs from before there were any go on."""
    content = load_recipe(small)._content(STAGE_NAMES)
    assert not {"calibrate", "expand", "window_layers", "window", "sinks"} & content["student"].keys()
    assert not {"training_only", "train_on_source"} & content["data"].keys()


@pytest.mark.parametrize(
    ("overrides", "whole", "hidden"),
    [
        ([], "10bbd61a1ae12b68", "8ec7b2f1f3c9423f"),
        (["student.mixer=sliding_window"], "75470e029ad79e2c", "ee4cf972015ce35f"),
        (
            [
                "student.window_layers=[1]",
                "student.expand=2",
                "data.training_only=a.jsonl",
                "student.keep_heads={2: [0]}",
                "data.workers=2",
            ],
            "2ba0882fd7cccc49",
            "92083c17bc426491",
        ),
    ],
)
def test_digests_are_those_that_folders_of_finished_runs_have(
    small: Path, overrides: list[str], whole: str, hidden: str
) -> None:
    """Who changes one, by a new key for instance, makes finished stages start again."""
    recipe = load_recipe(small, overrides)
    assert recipe.digest().startswith(whole)
    assert recipe.stage_digest("hidden").startswith(hidden)


def test_a_window_is_in_the_digest_wherever_a_layer_has_one(small: Path) -> None:
    sizes = ["student.window=8", "student.sinks=1"]
    for layers in (["student.mixer=sliding_window"], ["student.mixer=based", "student.window_layers=[1]"]):
        digests = [load_recipe(small, [*layers, *more]).digest() for more in ([], sizes[:1], sizes[1:], sizes)]
        assert len(set(digests)) == 4


def test_digest_is_the_same_in_every_spelling(small: Path) -> None:
    digest = load_recipe(small).digest()
    assert re.fullmatch("[0-9a-f]{64}", digest)
    spelled = SMALL.replace("1.5M", "1500000, lr: 0.001").replace("python-stdlib", "[python-stdlib]")
    small.write_text("seed: 0\n" + spelled)
    assert load_recipe(small).digest() == digest
