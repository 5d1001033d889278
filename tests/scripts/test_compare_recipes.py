"""scripts.compare_recipes: budgets, files and tables by hand, and one small comparison of real runs."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from distill.errors import UserError
from distill.recipe import Recipe, load_recipe
from scripts import compare_recipes
from scripts.compare_recipes import Plan
from scripts.comparison_pool import _said
from scripts.comparison_runs import Common, Wanted, cut_recipe, measured, prepare, recipe_file, slug, yaml_text
from scripts.comparison_table import _median_curve, draw, table
from tests.conftest import CHECKOUT
from tests.stages.conftest import saved_teacher, text, write_recipe

__all__ = ["saved_teacher", "text"]

PUBLISHED = sorted(path.stem for path in (CHECKOUT / "recipes" / "published").glob("*.yaml"))


@pytest.fixture
def common(tmp_path, saved_teacher, text, monkeypatch) -> Common:
    """A comparison on a tiny random teacher."""
    monkeypatch.chdir(CHECKOUT)
    teacher = write_recipe(tmp_path, saved_teacher, text)
    return Common(teacher, ("data.block=64",), "[1]", 256, 2, False, tmp_path / "out")


@pytest.mark.parametrize("recipe", ["ours", "mmmamba", *PUBLISHED])
def test_every_recipe_fills_the_budget_on_common_ground(common, recipe):
    budget = 1_002_000  # of which stages by themselves would leave more than a step
    path, settings = cut_recipe(common, Wanted(recipe, budget, 3.0, 7))
    own, cut = load_recipe(path), load_recipe(path, settings)
    teacher = load_recipe(common.teacher, common.overrides)
    assert (cut.teacher, cut.data, cut.seed) == (teacher.teacher, teacher.data, 7)
    assert cut.student.keep_attention.layers == (1,)
    assert cut.student.mixer == own.student.mixer
    nominal = sum(stage.tokens for stage in own.stages.named().values())
    steps = {name: stage.batch_size * cut.block_of(stage) for name, stage in cut.stages.named().items()}
    spent = [stage.tokens for stage in cut.stages.named().values()]
    assert budget - max(steps.values()) < sum(spent) <= budget
    for name, stage in cut.stages.named().items():
        before = own.stages.named()[name]
        assert stage.tokens % steps[name] == 0
        assert abs(stage.tokens - budget * before.tokens / nominal) <= sum(steps.values())
        assert (stage.lr, stage.mixer_lr) == pytest.approx((3 * before.lr, 3 * before.mixer_lr))


def test_a_recipe_may_train_on_other_text_and_is_measured_on_the_same(common):
    def cut(behind: str) -> Recipe:
        return load_recipe(*cut_recipe(common, Wanted(f"ours {behind}", 1_000_000, 1.0, 0)))

    shared, own = cut("data.block=32"), cut("data.training_only=a.jsonl data.train_on_source=false data.block=32")
    teacher = load_recipe(common.teacher, common.overrides)
    assert shared.data == teacher.data
    assert own.data == teacher.data.model_copy(update={"training_only": ("a.jsonl",), "train_on_source": False})


def test_a_recipe_by_name_by_file_and_with_settings(monkeypatch):
    monkeypatch.chdir(CHECKOUT)
    assert recipe_file("ours") == (Path("recipes/quickstart.yaml"), [])
    assert recipe_file("scratch student.rope=keep seed=1")[1] == ["student.rope=keep", "seed=1"]
    assert recipe_file("some/where.yaml") == (Path("some/where.yaml"), [])
    assert slug("ours student.keep_attention=[0, 3]") == "ours_student.keep_attention=_0_3"
    many = [f"ours {' '.join(f'stages.logits.betas=[0.9,0.{n}]' for n in range(20))} seed={seed}" for seed in (0, 1)]
    assert len({slug(recipe) for recipe in many}) == 2
    assert all(len(slug(recipe)) < 120 for recipe in many)


SIZES = {"parameters": 300_000, "remembered_bytes": 2560}
RESULT = {
    "recipe": "a",
    "budget": 1000,
    "factor": 1.0,
    "seed": 0,
    "agreement": 0.5,
    "cpu_seconds": 2.0,
    "curve": [],
} | SIZES


def test_the_table_gives_medians_ranges_and_failures():
    results = [
        {**RESULT, "loss": loss, "kl": kl, "seed": seed}
        for seed, (loss, kl) in enumerate([(2.5, 1), (2.1, 3), (2.2, 2)])
    ]
    results += [{**RESULT, "recipe": "b", "factor": 3.0, "loss": 2.15, "kl": 0.5}]
    results += [{"recipe": "c", "budget": 1000, "factor": 0.3, "seed": 0, "curve": [], "failed": "not finite"}]
    found = {
        "teacher": {"name": "t", "loss": 2.0, "recall": None},
        "settings": {"keep_attention": "[]", "evaluation_tokens": 4000, "grid": [0.3, 1.0, 3.0], "tuned_at": 500},
        "results": results,
        "tried": [{**RESULT, "factor": factor, "loss": 2 + factor} for factor in (0.3, 1.0, 3.0)],
    }
    rows = table(found).splitlines()[4:]
    assert rows == [
        "| 1K | b | 0.1500 | 0.5000 | 50.0% | 2 | 300K | 2.5 KiB | 3, edge | 1 |",
        "| 1K | a | 0.2000 (0.1000 to 0.5000) | 2.0000 (1.0000 to 3.0000) | 50.0% (50.0% to 50.0%) | 2 (2 to 2) "
        "| 300K | 2.5 KiB | 1 | 3 |",
        "| 1K | c | failed | failed | failed | failed |  |  | 0.3, edge | 1, 1 failed |",
        "",
        "| gap at 500 by factor on the rates | 0.3 | 1 | 3 |",
        "| --- | --- | --- | --- |",
        "| a | 0.300 | 1.000 | 3.000 |",
    ]


def test_a_rate_that_failed_is_told_as_in_the_table():
    tried = [{**RESULT, "factor": 1.0, "loss": 2.5}, {"recipe": "a", "factor": 3.0, "failed": "not finite"}]
    settings = {"keep_attention": "[]", "evaluation_tokens": 4000, "grid": [1.0, 3.0], "tuned_at": 500}
    teacher = {"name": "t", "loss": 2.0, "recall": None}
    found = {"teacher": teacher, "settings": settings, "results": [], "tried": tried}
    assert table(found).splitlines()[-1] == "| a | 0.500 | failed |"


def test_a_seed_that_lacks_a_point_leaves_it_out_of_the_median():
    def curve(*losses: float) -> list[dict]:
        return [{"tokens": 100 * at, "cpu_seconds": 1.0, "loss": loss} for at, loss in enumerate(losses) if loss]

    assert [point["gap"] for point in _median_curve([curve(5, 3, 2), [], curve(5, 0, 4)], 1.0)] == [4, 2]
    assert _median_curve([[], []], 1.0) == []


def legend_of(results: list[dict], monkeypatch, tmp_path) -> tuple[list, list[str]]:
    legends = []
    monkeypatch.setattr(Figure, "legend", lambda _, lines, labels, **__: legends.append((lines, labels)))
    found = {"teacher": {"name": "t", "loss": 2.0}, "settings": {"keep_attention": "[]"}, "results": results}
    draw(found, tmp_path / "gap.png")
    return legends[0]


def test_a_recipe_that_failed_at_the_largest_budget_is_named_by_its_other_line(monkeypatch, tmp_path):
    point = {"tokens": 1000, "cpu_seconds": 2.0, "loss": 2.5}
    drawn = [{**RESULT, **point, "recipe": name, "curve": [point]} for name in "ab"]
    larger = [{**drawn[0], "budget": 2000}, {"recipe": "b", "budget": 2000, "factor": 1.0, "failed": "x", "curve": []}]
    _, labels = legend_of([*drawn, *larger], monkeypatch, tmp_path)
    assert sorted(labels) == ["a", "b"]


def test_the_picture_names_every_recipe_and_tells_more_than_ten_apart(monkeypatch, tmp_path):
    point = {"tokens": 1000, "cpu_seconds": 2.0, "loss": 2.5}
    results = [{**RESULT, **point, "recipe": f"r{number}", "curve": [point]} for number in range(12)]
    results += [{**results[0], "budget": 2000}]
    lines, labels = legend_of(results, monkeypatch, tmp_path)
    assert sorted(labels) == sorted(f"r{number}" for number in range(12))
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 12


def test_a_teacher_whose_text_is_still_to_be_had_says_how(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("teacher: {path: t}\ndata: {source: nowhere.txt}\nstages: {logits: {tokens: 1K}}\n")
    compare_recipes._require_text("known", compare_recipes.Teacher(recipe))
    with pytest.raises(UserError, match=r"--teacher known: there is no nowhere\.txt here; write it"):
        compare_recipes._require_text("known", compare_recipes.Teacher(recipe, absent="write it"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--recipe", "none"], "there is no recipe 'none'; allowed: a file, ours, "),
        (
            ["--recipe", "mohawk", "--budget", "9K"],
            "mohawk: 240 tokens of 9000 are left for mixing, less than one step of 512; give a --budget of"
            " at least 19200",
        ),
        (["--recipe", "scratch", "--budget", "much"], "--budget much: give tokens such as 500000, 500K or 4M"),
        (["--recipe", "kl_only", "--recipe", " kl_only"], "two would have the same folder"),
        (
            ["--recipe", "kl_only stages.logits.offline_teacher.top_k=8"],
            "stages.logits.offline_teacher has no place",
        ),
        (["--recipe", "kl_only stages.logits.lrr=1"], "stages.logits.lrr: unknown key, did you mean 'lr'?"),
        (["--recipe", "none"], ", quickstart, recall-heads, recall-hybrid, "),
        (["--recipe", "ours name='x"], "--recipe ours name='x: no closing quotation; quote settings as in a shell"),
        (["--recipe", ""], "--recipe '': names no recipe; allowed: a file, ours, "),
        (["--recipe", "ours", "--teacher", "stories260K"], "--teacher stories260K: allowed: stdlib-1m, stories260k, "),
        (["--recipe", "ours", "--tune-budget", "1M"], "--tune-budget given without --tune"),
        (["--recipe", "ours", "--factor", "3"], "--factor given without --tune"),
        (
            ["--recipe", "ours", "--recipe", "kl_only student.window_layers=[99]"],
            "kl_only student.window_layers=[99]: ",
        ),
        (["--recipe", "ours data.training_only=missing.jsonl"], "data.training_only 'missing.jsonl': no such file"),
        (["--recipe", "scratch stages.logits.ce_weight=0.5"], "student.from_scratch leaves nothing of the teacher"),
    ],
)
def test_mistakes_end_with_two_before_anything_is_trained(common, capsys, arguments, said):
    import typer
    from typer.testing import CliRunner

    app = typer.Typer()
    app.command()(compare_recipes.main)
    given = [*arguments, *([] if "--budget" in arguments else ["--budget", "1M"])]
    given = [*given, *([] if "--teacher" in arguments else ["--teacher", str(common.teacher)])]
    ended = CliRunner().invoke(app, [*given, "--output", str(common.output)])
    assert ended.exit_code == 2, ended.output
    assert said in ended.stderr
    assert not common.output.exists()


def test_all_recipes_can_be_given_the_same_step(common):
    """Tokens a step: where a stage cuts the text's blocks in four it reads four times as many."""
    path, settings = cut_recipe(
        replace(common, overrides=("data.block=256",), batch_size=2), Wanted("radlads", 8192, 1.0, 0)
    )
    stages = load_recipe(path, settings).stages.named()
    assert {name: stage.batch_size for name, stage in stages.items()} == {"hidden": 8, "logits": 2}


def test_the_rates_with_the_smallest_gap_are_taken():
    tried = [{**RESULT, "factor": factor, "loss": loss} for factor, loss in [(0.3, 2.4), (1.0, 2.3)]]
    tried += [
        {"recipe": "a", "factor": 3.0, "failed": "not finite"},
        {**RESULT, "recipe": "b", "loss": 2.1, "factor": 3.0},
    ]
    assert compare_recipes._best(tried, "a", 2.0) == 1.0


def carried_out_by(log: list[Wanted]):
    """In the place of runs: the loss grows with the factor's distance from 3."""

    def carry_out(wanted: list[Wanted]) -> list[dict]:
        log.extend(wanted)
        return [{**RESULT, **asdict(one), "loss": 2 + abs(one.factor - 3)} for one in wanted]

    return carry_out


def test_tuned_rates_are_taken_and_larger_budgets_may_have_fewer_seeds():
    log: list[Wanted] = []
    plan = Plan(("a", "b"), (1000, 2000), seeds=2, seeds_above=1, grid=(1.0, 3.0), tuned_at=500)
    first, last = compare_recipes.rounds(plan, 2.0, carried_out_by(log))
    assert log[:4] == [Wanted(recipe, 500, factor, 0) for recipe in "ab" for factor in (1.0, 3.0)]
    smallest = [Wanted(recipe, 1000, 3.0, seed) for seed in (0, 1) for recipe in "ab"]
    assert log[4:] == [*smallest, Wanted("a", 2000, 3.0, 0), Wanted("b", 2000, 3.0, 0)]
    assert len(first["tried"]) == len(last["tried"]) == 4
    assert (len(first["results"]), len(last["results"])) == (4, 6)


def test_without_tuning_seeds_are_not_trained_one_after_the_other():
    calls: list[list[Wanted]] = []
    plan = Plan(("a",), (1000,), seeds=3, seeds_above=3)
    (found,) = compare_recipes.rounds(plan, 2.0, lambda wanted: calls.append(list(wanted)) or [])
    assert calls == [[Wanted("a", 1000, 1.0, seed) for seed in range(3)]]
    assert found["tried"] == []


def test_a_single_factor_is_taken_and_what_tried_it_is_the_first_seed():
    log: list[Wanted] = []
    grid, tuned_at = compare_recipes._tuning(True, [3.0], None, 1000)
    plan = Plan(("a",), (1000,), seeds=2, seeds_above=2, grid=grid, tuned_at=tuned_at)
    assert len(list(compare_recipes.rounds(plan, 2.0, carried_out_by(log)))) == 1
    assert log[0] == log[1] == Wanted("a", 1000, 3.0, 0)  # in one folder, so it is not trained again


def test_what_was_measured_on_other_tokens_is_not_set_beside(common, monkeypatch):
    wanted = Wanted("kl_only stages.logits.batch_size=4", 512, 1.0, 0)
    wanted.folder(common.output).mkdir(parents=True)  # of a comparison from before there was a record
    prepare(common, wanted)
    prepare(common, wanted)
    for key, value in (("evaluation_tokens", 128), ("points", 3)):
        with pytest.raises(UserError) as refused:
            prepare(replace(common, **{key: value}), wanted)
        assert "was begun with 256 held-out tokens and 2 evaluations on the way, not " in str(refused.value)
        assert "give what it was begun with, or another --output" in str(refused.value)


def test_an_output_whose_name_is_a_number_is_a_folder(common, monkeypatch):
    monkeypatch.chdir(CHECKOUT)
    path, settings = cut_recipe(replace(common, output=Path("2026")), Wanted("kl_only", 1_000_000, 1.0, 0))
    assert load_recipe(path, settings).run_dir.parts[0] == "2026"
    assert load_recipe(path, [*settings, f"run_dir={yaml_text(Path('2026'))}"]).run_dir == Path("2026")


def finished_run(folder: Path, losses: list[float | None], kl: float | None = 1.0) -> Any:
    """What `measured` looks at of a run of one stage that was evaluated after each step."""
    (folder / "convert").mkdir()
    report = {"state_bytes": 10, "kv_bytes_per_token": 1, "parameters_after": {"all": 5}}
    (folder / "convert" / "conversion.json").write_text(json.dumps(report))
    (folder / "logits").mkdir()
    lines = []
    for step, loss in enumerate(losses):
        lines += [{"kind": "train", "step": step, "tokens": 100 * step, "cpu_seconds": 1.0}] if step else []
        numbers = {"loss": loss, "kl": kl, "agreement": 0.5}
        lines += [{"kind": "eval", "step": step, "tokens": 100 * step, **numbers}]
    (folder / "logits" / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    recipe = SimpleNamespace(data=SimpleNamespace(block=64))
    return SimpleNamespace(stages=["convert", "logits"], folder=lambda stage: folder / stage, recipe=recipe)


def test_a_point_without_a_loss_is_left_out(common, tmp_path):
    result = measured(common, finished_run(tmp_path, [3.0, None, 2.5]))
    assert [point["tokens"] for point in result["curve"]] == [0, 200]
    assert (result["loss"], result["remembered_bytes"]) == (2.5, 74)


@pytest.mark.parametrize(("losses", "kl", "said"), [([3.0, None], 1.0, "loss"), ([3.0, 2.0], None, "KL")])
def test_a_student_that_ends_outside_of_the_numbers_has_failed(common, tmp_path, losses, kl, said):
    failed = measured(common, finished_run(tmp_path, losses, kl))
    assert failed == {"failed": f"the held-out {said} is not finite", "curve": []}
    assert _said(failed) == failed["failed"]


@pytest.mark.slow
def test_a_comparison_and_its_continuation(common):
    """Two recipes, one seed, two steps each; slow because its processes start anew."""
    recipe = "kl_only stages.logits.batch_size=4"
    arguments = {
        "recipe": [recipe, "scratch stages.logits.batch_size=4"],
        "budget": ["512"],
        "teacher": str(common.teacher),
        "output": common.output,
        "evaluation_tokens": "256",
        "points": 2,
    }
    compare_recipes.main(**arguments)
    record = json.loads((common.output / "results.json").read_text())
    assert record["tried"] == []
    assert [one["recipe"] for one in record["results"]] == arguments["recipe"]
    for result in record["results"]:
        assert [point["tokens"] for point in result["curve"]] == [0, 256, 512]
        assert result["cpu_seconds"] > 0
    assert "| 512 | kl_only" in (common.output / "table.md").read_text()
    height, width, _ = imread(common.output / "gap.png").shape
    assert width > height > 200

    # What is there is not trained again, and what is not there is.
    runs = common.output / "runs"
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("model.safetensors")}
    shutil.rmtree(runs / slug(recipe))
    compare_recipes.main(**arguments)
    again = json.loads((common.output / "results.json").read_text())
    timeless = [
        [{**one, "cpu_seconds": 0, "curve": len(one["curve"])} for one in r["results"]] for r in (record, again)
    ]
    assert timeless[0] == timeless[1]
    after = {path: path.stat().st_mtime_ns for path in runs.rglob("model.safetensors")}
    assert after.keys() == before.keys()
    assert all(after[path] == time for path, time in before.items() if "scratch" in str(path))


@pytest.mark.parametrize("name", compare_recipes.TEACHERS)
def test_the_teachers_are_those_of_shipped_recipes(name):
    teacher = compare_recipes.TEACHERS[name]
    recipe = load_recipe(CHECKOUT / teacher.recipe)
    assert teacher.recall == (recipe.teacher.path == "teachers/recall")
