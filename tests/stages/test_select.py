"""stages.select from the recipe to what it writes: mistakes, a whole selection, and one that was cut off."""

import json
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import typer
from typer.testing import CliRunner

import distill.selection.measures
from distill.errors import UserError
from distill.recipe import STAGE_NAMES, load_recipe
from distill.run import at_work_on
from distill.selection.asked import SETS, ask
from distill.selection.budget import OF_STUDENT, divide
from distill.selection.ledger import Ledger
from distill.selection.measures import Measures
from distill.selection.ranking import by_score
from distill.selection.record import FILES, write
from distill.selection.runs import choice_folder, scoring_batches
from stages import select
from tests.conftest import CHECKOUT
from tests.stages.run_folder import contents

# 10 steps of each stage that aligns, and a block for each forward pass.
SETTINGS = {"keep": 1, "total": 3000, "score": 64}


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch):
    monkeypatch.chdir(CHECKOUT)
    torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"keep": 3},
            "--keep is 3; allowed are 1 to 2: of 3 layers 3 may keep attention, and one",
        ),
        ({"keep": 0}, "--keep is 0; allowed are 1 to 2"),
        ({"among": "0", "keep": 2}, "--keep is 2; allowed are 1 to 1: of 3 layers 1 may keep attention"),
        ({"among": "0,7"}, "--among names layer 7; the teacher has 3 layers, numbered 0 to 2"),
        ({"among": "1,1"}, "--among is '1,1'; give different layers such as 2,5,8"),
        ({"among": "last"}, "--among is 'last'; give different layers"),
        ({"method": "best"}, "--method is 'best'; allowed are restore, greedy, mixing, hidden, probe, uniform, last"),
        ({"method": "last", "refine": 512}, "--refine is for a ranking with scores, and last has none"),
        (
            {"method": "restore", "total": 500},
            "180 of 500 tokens are left to align the student, less than one step of 128 in mixing",
        ),
    ],
)
def test_mistakes_are_told_before_anything_is_written(recipe, settings, said):
    before = contents(recipe.parent)
    with pytest.raises(UserError, match=said):
        ask(recipe, (), output=recipe.parent / "out", **{**SETTINGS, **settings})
    assert contents(recipe.parent) == before


def test_a_mixer_without_a_matrix_is_not_ranked_by_it(recipe):
    overrides = ["student.mixer=sliding_window", "stages.mixing=null"]
    with pytest.raises(UserError, match="--method mixing is not for sliding_window: "):
        ask(recipe, overrides, output=recipe.parent / "out", **SETTINGS, method="mixing")


def test_heads_are_not_ranked_as_layers(recipe):
    with pytest.raises(UserError, match=r"student\.keep_heads keeps single heads, and selection is of whole layers"):
        ask(recipe, ["student.keep_heads={1: [0]}"], output=recipe.parent / "out", **SETTINGS)


def test_layers_that_were_set_apart_are_not_chosen_among(recipe):
    with pytest.raises(UserError, match=r"student\.window_layers sets layers apart before any is chosen"):
        ask(recipe, ["student.window_layers=[1]"], output=recipe.parent / "out", **SETTINGS)


def test_the_program_ends_with_exit_code_2(recipe):
    app = typer.Typer()
    app.command()(select.main)
    before = contents(recipe.parent)
    output = str(recipe.parent / "out")
    for arguments in (["--keep", "5"], ["--keep", "1", "--budget", "much"], ["--keep", "1", "stages.hidden=null"]):
        ended = CliRunner().invoke(app, [str(recipe), "--output", output, *arguments])
        assert ended.exit_code == 2, ended.output
    assert contents(recipe.parent) == before


@pytest.mark.parametrize("method", ["uniform", "last", "first_last"])
def test_a_baseline_measures_nothing(recipe, method):
    output = recipe.parent / "out"
    found = select.select(ask(recipe, (), output=output, keep=2, method=method))
    write(found, output)
    assert {path.name for path in output.iterdir()} == set(FILES)
    assert found.tokens == 0
    assert load_recipe(output / "recipe.yaml").student.keep_attention.layers == found.layers


def test_scores_know_the_length_of_rows_and_the_teacher_s_precision(recipe):
    """Both change what a forward pass finds, though text, tokens and weights are the same."""
    told = []
    for settings in ([], ["data.block=16"], ["teacher.dtype=bfloat16"]):
        asked = ask(recipe, settings, output=recipe.parent / "out", keep=1, method="probe", total=1200, score=64)
        with select.measures(asked) as measured:
            told.append(measured.ledger.of)
    assert len(set(told)) == 3


def test_no_stage_of_any_seed_reads_in_the_order_of_the_scoring_text(recipe):
    def run(seed, method="probe"):
        asked = ask(recipe, [f"seed={seed}"], output=recipe.parent / "out", keep=1, method=method)
        return at_work_on(recipe, asked.overrides)

    def first_rows(batches):
        return [row.tolist() for batch in batches for row in batch["input_ids"]][:4]

    trained = []
    for seed in range(5):
        with run(seed) as opened:
            for stage in STAGE_NAMES:
                trained.append(first_rows(opened.training_batches(stage, 1).batch(step) for step in range(4)))
    for seed in (0, 1):
        with run(seed) as opened:
            assert first_rows(scoring_batches(opened, 4 * 32)) not in trained


class Counting(Measures):
    """Measures of a student and a teacher that are not there."""

    def __init__(self, asked):
        self.student = object() if asked.budget.align else None
        self.batches, self.tokens = [], asked.budget.score
        self.settings = {}
        self.ledger = Ledger(asked.output / "measured.json")
        self.run = SimpleNamespace(teacher=None, tokenizer=SimpleNamespace(bos_token_id=None), recipe=asked.recipe)


@pytest.mark.parametrize("method", [*OF_STUDENT, "probe"])
@pytest.mark.parametrize("keep", [1, 2, 3])
@pytest.mark.parametrize("refine", [0, 1024])
def test_no_more_passes_are_made_than_were_promised(recipe, monkeypatch, method, keep, refine):
    candidates = tuple(range(5))
    asked = ask(recipe, (), output=recipe.parent / "out", keep=1, method=method, total=20_000)
    costs = {"candidates": 5, "keep": keep, "total": 20_000, "refine": refine, "refined": 4, "sets": SETS}
    budget = divide(asked.recipe, method=method, **costs)
    asked = replace(asked, n_layers=5, candidates=candidates, keep=keep, budget=budget)
    scores = dict.fromkeys(candidates, 1.0)
    measures = distill.selection.measures

    @contextmanager
    def counting(asked):
        yield Counting(asked)

    monkeypatch.setattr(select, "measures", counting)
    monkeypatch.setattr(select, "_after", lambda asked, measured, layers: measured.kl_of(None))
    monkeypatch.setattr(measures, "divergence", lambda student, teacher, layers, batches: 1.0)
    monkeypatch.setattr(measures, "probe", lambda *given, **settings: by_score(scores, "nats"))
    monkeypatch.setattr(measures, "distances", lambda *given: scores)
    monkeypatch.setattr(select.mixing, "MixingObjective", lambda *given: None)
    monkeypatch.setattr(select.hidden, "HiddenObjective", lambda *given: None)
    found = select.select(asked)
    assert found.scoring <= budget.passes * budget.score
    assert found.tokens <= budget.spent <= 20_000


class CutOffError(Exception):
    pass


@pytest.mark.slow
def test_a_selection_that_was_cut_off_goes_on_and_ends_as_one_that_was_not(recipe, monkeypatch):
    """One run through everything: alignment, every layer, choices trained, files; twice, once with interruptions."""
    refine = {"refine": 256, "refined": 2, "total": 4500, "score": 64, "keep": 1}
    original, calls = distill.selection.measures.divergence, []

    def counted(student, teacher, layers, batches):
        calls.append(layers)
        return original(student, teacher, layers, batches)

    monkeypatch.setattr(distill.selection.measures, "divergence", counted)
    whole = recipe.parent / "whole"
    found = select.select(ask(recipe, (), output=whole, **refine, method="restore"))
    write(found, whole)
    told = json.loads((whole / "selection.json").read_text())
    made = len(calls)

    assert found.tokens <= 4500
    assert told["cost"]["scoring"] == 64 * made
    assert told["cost"]["refinement"] == 2 * 256
    assert found.tokens == sum(told["cost"][part] for part in ("scoring", "refinement")) + sum(found.alignment.values())
    assert len(found.refined) == 2
    assert found.refined[0].kl_after <= found.refined[1].kl_after
    assert found.layers == found.refined[0].layers
    assert all(one.kl_after < one.kl_before for one in found.refined)  # training did something
    assert [entry["layer"] for entry in told["ranking"]] == list(found.ranking.order)
    written = load_recipe(whole / "recipe.yaml")
    given = load_recipe(recipe)
    assert written.student.keep_attention.layers == found.layers
    assert (written.stages, written.data, written.teacher) == (given.stages, given.data, given.teacher)
    assert written.run_dir != given.run_dir
    comment = (whole / "recipe.yaml").read_text().splitlines()[:3]
    assert all(line.startswith("# ") for line in comment)
    assert "`stages.select --method restore` chose; 2 choices refined" in comment[0]
    assert not any((whole / "choices").iterdir())

    limits = [2, made - 1]  # between two layers; after a choice was trained and before it was measured

    def cutting(student, teacher, layers, batches):
        if limits and len(calls) == limits[0]:
            raise CutOffError
        return counted(student, teacher, layers, batches)

    monkeypatch.setattr(distill.selection.measures, "divergence", cutting)
    again = recipe.parent / "again"
    calls.clear()
    while limits:
        with pytest.raises(CutOffError):
            select.select(ask(recipe, (), output=again, **refine, method="restore"))
        limits.pop(0)
    assert next((again / "choices").iterdir()) in [choice_folder(again, one.layers) for one in found.refined]
    resumed = select.select(ask(recipe, (), output=again, **refine, method="restore"))
    write(resumed, again)
    assert len(calls) == made  # nothing twice
    for name in ("selection.json", "recipe.yaml", "selection.png"):
        assert (again / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
def test_distances_and_the_probe_rank_all_layers(recipe):
    for method in ("mixing", "hidden", "probe"):  # the first two on one student
        output = recipe.parent / ("probe" if method == "probe" else "out")
        asked = ask(recipe, (), output=output, keep=2, method=method, total=1200, score=64)
        found = select.select(asked)
        write(found, asked.output)
        assert sorted(found.ranking.scores) == [0, 1, 2]
        assert found.scoring == asked.budget.passes * 64
        assert found.tokens <= 1200
        assert bool(found.alignment) == (method != "probe")
    assert (recipe.parent / "probe" / "aligned" / "data").is_dir()
    assert not (recipe.parent / "probe" / "aligned" / "convert").exists()
