"""What selection may cost: never more than it was given, by what is really measured; and what goes on after a kill."""

import json

import pytest

from distill.errors import UserError
from distill.recipe import load_recipe
from distill.selection.budget import METHODS, OF_STUDENT, divide, passes_of
from distill.selection.ledger import Ledger
from distill.selection.scores import greedy, restore_one
from tests.conftest import CHECKOUT

QUICKSTART = CHECKOUT / "recipes" / "quickstart.yaml"


# Shares and steps of a recipe, whatever the shipped one says.
TOKENS = {"mixing": "100K", "hidden": "400K", "logits": "2M"}
STAGES = [f"stages.{name}={{tokens: {number}, batch_size: 16}}" for name, number in TOKENS.items()]


@pytest.fixture
def recipe():
    return load_recipe(QUICKSTART, STAGES)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("candidates", "keep", "refine"), [(8, 1, 0), (8, 2, 8192), (32, 3, 0)])
def test_all_of_it_is_a_tenth_of_the_distillation_at_most(recipe, method, candidates, keep, refine):
    asked = {"candidates": candidates, "keep": keep}
    budget = divide(recipe, method=method, **asked, refine=refine, refined=4, sets=6)
    assert budget.distillation == 2_500_000
    assert budget.total == 250_000
    parts = [*budget.align.values(), budget.passes * budget.score, budget.refined * budget.refine]
    assert budget.spent == sum(parts) <= budget.total
    assert budget.score % 256 == 0
    for name, tokens in budget.align.items():
        assert tokens % (16 * 256) == 0
        assert 0 < tokens <= recipe.stages.named()[name].tokens
    if method in OF_STUDENT or refine:  # nothing is left but what makes no step
        assert sum(budget.align.values()) > budget.total - budget.passes * budget.score - 4 * refine - 3 * 16 * 256
        assert budget.align["hidden"] / budget.align["mixing"] == pytest.approx(4, rel=0.3)
    else:
        assert not budget.align


def test_with_much_to_spend_alignment_takes_what_the_recipe_s_own_stages_do(recipe):
    budget = divide(recipe, method="restore", candidates=8, keep=1, total=10_000_000)
    assert budget.score == 32_768
    assert budget.align == {"mixing": 24 * 4096, "hidden": 97 * 4096}


def test_passes_are_those_that_methods_make():
    calls = []

    def kl(layers):
        calls.append(layers)
        return -float(sum(layers))

    restore_one(range(8), kl)
    calls.append("the choice")
    assert len(calls) == passes_of("restore", 8, 2)
    calls.clear()
    greedy(range(8), kl, 3)
    assert len(calls) == passes_of("greedy", 8, 3)


@pytest.mark.parametrize(
    ("stages", "asked", "said"),
    [
        (
            "hidden",
            {"method": "restore"},
            "--method restore ranks by an aligned student, and the recipe has no",
        ),
        ("hidden", {"method": "probe", "refine": 8192}, "--refine ranks by an aligned student"),
        ("logits", {"refine": 8192}, "--refine trains choices as the recipe's stage logits does, and it has none"),
        (None, {"total": 8000}, "8,000 tokens leave less than one block of 256 for each of 10 forward passes"),
        (
            None,
            {"total": 10_000, "score": 256},
            "tokens are left to align the student, less than one step of",
        ),
        (None, {"score": 100}, "--score-tokens 100 is less than one block of the text; give 256 at least"),
        (None, {"refine": 60_000}, "0 of 250,000 tokens are left to align the student"),
        (None, {"refine": 100}, "100 tokens are less than one step of 4096"),
        (
            None,
            {"method": "probe", "score": 30_000, "total": 50_000},
            "10 forward passes of 29,952 tokens are",
        ),
    ],
)
def test_what_does_not_fit_is_said(stages, asked, said):
    recipe = load_recipe(QUICKSTART, STAGES if stages is None else [*STAGES, f"stages.{stages}=null"])
    with pytest.raises(UserError, match=said.replace("(", r"\(")):
        divide(recipe, **{"method": "restore", "candidates": 8, "keep": 1, "refined": 4, "sets": 6, **asked})


def test_what_was_measured_is_not_measured_again(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"kl": 0.5, "tokens": 100}

    first = Ledger(tmp_path / "deep" / "measured.json", "student", 1)
    assert first.measure("kl 3", make) == {"kl": 0.5, "tokens": 100}
    first.measure("kl 3", make)
    first.measure("kl 4", make)
    assert (len(made), first.tokens) == (2, 200)
    again = Ledger(tmp_path / "deep" / "measured.json", "student", 1)
    assert again.tokens == 0  # of what it was asked for itself
    again.measure("kl 3", make)
    assert (len(made), again.tokens) == (2, 100)


@pytest.mark.parametrize("harm", ["another student", "cut short", "not a ledger"])
def test_numbers_of_another_student_or_a_broken_file_are_not_used(tmp_path, harm):
    path = tmp_path / "measured.json"
    Ledger(path, "student").measure("kl 3", lambda: {"kl": 0.5, "tokens": 1})
    if harm == "cut short":
        path.write_text(path.read_text()[:-9])
    if harm == "not a ledger":
        path.write_text("[]")
    found = Ledger(path, "another" if harm == "another student" else "student")
    assert found.measure("kl 3", lambda: {"kl": 0.7, "tokens": 1})["kl"] == 0.7
    assert json.loads(path.read_text())["measured"] == {"kl 3": {"kl": 0.7, "tokens": 1}}
