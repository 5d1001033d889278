"""scripts.compare_layers: rank correlations by hand and by counting, and the table of an exhaustive search."""

import itertools
import random

import pytest
from matplotlib.image import imread

from scripts.layer_agreement import draw, table
from scripts.rank_correlation import kendall, spearman


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
