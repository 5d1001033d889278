"""scripts.compare_layers: correlations by hand and by counting, the table of a search, and which one is asked for."""

import itertools
import json
import random
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import typer
from matplotlib.image import imread
from typer.testing import CliRunner

from distill.selection.ranking import by_score
from scripts import compare_layers
from scripts.layer_agreement import draw, table
from scripts.rank_correlation import kendall, spearman
from tests.conftest import CHECKOUT
from tests.stages.conftest import saved_teacher, text, write_recipe

__all__ = ["saved_teacher", "text"]


def test_correlations_of_orders_known_by_hand():
    assert spearman([1, 2, 3], [10, 20, 30]) == kendall([1, 2, 3], [10, 20, 30]) == 1
    assert spearman([1, 2, 3], [3, 2, 1]) == kendall([1, 2, 3], [3, 2, 1]) == -1
    # Without ties 1 − 6 Σ d² / (n (n² − 1)): d² = 1, 1, 1, 1 of n = 4; and 4 of 6 pairs agree.
    assert spearman([1, 2, 3, 4], [2, 1, 4, 3]) == pytest.approx(1 - 6 * 4 / 60)
    assert kendall([1, 2, 3, 4], [2, 1, 4, 3]) == pytest.approx((4 - 2) / 6)
    # A tie in x alone: of three pairs two agree, and x tells two apart, y three.
    assert kendall([1, 1, 2], [1, 2, 3]) == pytest.approx(2 / 6**0.5)
    assert spearman([1, 1, 2], [1, 2, 3]) == pytest.approx(1.5 / (1.5 * 2) ** 0.5)
    assert spearman([1, 1], [1, 2]) is kendall([1, 1], [1, 2]) is None


def test_kendall_s_is_what_is_left_of_pairs_in_order():
    rng = random.Random(0)
    x, y = ([rng.randrange(5) for _ in range(12)] for _ in range(2))
    pairs = list(itertools.combinations(range(12), 2))
    alike = sum((x[i] - x[j]) * (y[i] - y[j]) > 0 for i, j in pairs)
    unlike = sum((x[i] - x[j]) * (y[i] - y[j]) < 0 for i, j in pairs)
    in_x, in_y = (sum(z[i] != z[j] for i, j in pairs) for z in (x, y))
    assert kendall(x, y) == pytest.approx((alike - unlike) / (in_x * in_y) ** 0.5)


@pytest.fixture
def found():
    outcomes = {(0,): (2.1, 0.5), (1,): (2.5, 0.1), (2,): (2.3, 0.3)}  # loss and KL need not agree
    scores = {"0": 0.1, "1": 0.9, "2": 0.5}
    return {
        "teacher": {"loss": 2.0},
        "settings": {
            "recipe": "r",
            "teacher": "t",
            "n_layers": 3,
            "tokens": 60_000,
            "evaluation_tokens": 1000,
            "distillation": 100_000,
        },
        "sizes": [
            {
                "keep": 1,
                "results": [
                    {"layers": list(layers), "seed": seed, "loss": loss + shift, "kl": kl + shift}
                    for layers, (loss, kl) in outcomes.items()
                    for seed, shift in enumerate((-0.05, 0.05))
                ],
                "methods": [
                    {"method": "restore", "layers": [1], "scores": scores, "tokens": 5000},
                    {"method": "mixing", "layers": [2], "scores": {**scores, "2": 1.0}, "tokens": 4000},
                    {"method": "last", "layers": [2], "scores": None, "tokens": 0},
                ],
            }
        ],
    }


def test_the_table_has_places_by_kl_over_seeds_and_agreement(found, tmp_path):
    lines = table(found).splitlines()
    assert "1 kept, 3 choices: the lowest KL has 1 (0.1000), the mean of all is 0.3000, the worst 0.5000." in lines
    assert lines[-3:] == [
        "| restore | 1 | 0.1000 | 1 of 3 | 0.5000 | +1.00 | +1.00 | 5K | 5.0% |",
        "| mixing | 2 | 0.3000 | 2 of 3 | 0.3000 | +0.50 | +0.33 | 4K | 4.0% |",
        "| last | 2 | 0.3000 | 2 of 3 | 0.3000 |  |  | 0 | 0.0% |",
    ]
    draw(found, tmp_path / "layers.png")
    assert imread(tmp_path / "layers.png").ndim == 3


@pytest.fixture
def search(tmp_path, saved_teacher, text, monkeypatch):
    """Runs the program on a tiny teacher, with trainings and measures that only note that they were asked for."""
    monkeypatch.chdir(CHECKOUT)
    recipe, done = write_recipe(tmp_path, saved_teacher, text), []

    @contextmanager
    def measures(asked):
        done.append("aligned")
        yield SimpleNamespace(settings={"aligned": "a"}, tokens=64, kl=lambda layers: -float(sum(layers)))

    def trained(asked, measured, layers, *rest):
        done.append(layers)
        return {"loss": 2.5, "kl": 1.0 / (1 + sum(layers)), "tokens": 256}

    monkeypatch.setattr(compare_layers, "measures", measures)
    monkeypatch.setattr(compare_layers, "rank", lambda asked, measured: by_score(dict.fromkeys(range(3), 0.0), "none"))
    monkeypatch.setattr(compare_layers, "_teacher", lambda measured, tokens: {"loss": 2.0, "tokens": tokens})
    monkeypatch.setattr(compare_layers, "_trained", trained)
    app = typer.Typer()
    app.command()(compare_layers.main)

    def run(*arguments):
        done.clear()
        ended = CliRunner().invoke(app, [str(recipe), "--output", str(tmp_path / "out"), *arguments])
        return SimpleNamespace(code=ended.exit_code, said=ended.output, done=list(done), folder=tmp_path / "out")

    return run


def test_choices_are_trained_anew_where_stage_logits_is_another(search):
    assert len(search("--keep", "1").done) == 1 + 3
    assert search("--keep", "1").done == ["aligned"]
    assert len(search("--keep", "1", "stages.logits.lr=0.5").done) == 1 + 3


@pytest.mark.parametrize("mixer", ["gated_deltanet", "sliding_window"])
def test_a_mixer_without_a_matrix_is_compared_by_the_other_methods(search, mixer):
    ended = search("--keep", "1", f"student.mixer={mixer}", "stages.mixing=null")
    assert ended.code == 0, ended.said
    methods = json.loads((ended.folder / "results.json").read_text())["sizes"][0]["methods"]
    assert {"greedy", "mixing", "probe"} - {method["method"] for method in methods} == {"mixing"}


def test_sizes_without_a_choice_that_was_asked_for_are_left_out(search):
    ended = search("--only", "0-2")  # of one and two layers
    assert ended.code == 0, ended.said
    assert ended.done == ["aligned", (0, 2)]
    assert [size["keep"] for size in json.loads((ended.folder / "results.json").read_text())["sizes"]] == [2]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--only", "3"), "--only names 3, which is no choice of 1 or 2 of the layers 0 to 2"),
        (("--only", "0", "--only", "2-0", "--only", "x"), "--only names 2-0, x, which is no choice"),
        (("--keep", "0", "--keep", "1"), "--keep is 0; allowed are 1 to 2"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(search, arguments, said):
    ended = search(*arguments)
    assert (ended.code, ended.done) == (2, [])
    assert said in ended.said
