import math

import pytest

from eval import words


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "–"),
        (1.23456, "1.235"),
        (-0.0001, "0.000"),
        (-1234.5, "−1,234"),
        (1234.5, "1,234"),
        (3.2e9, "3.2e9"),
        (1.2e40, "1.2e40"),
        (math.inf, "∞"),
        (math.nan, "not finite"),
    ],
)
def test_plain(value, said):
    assert words.plain(value) == said


@pytest.mark.parametrize(
    ("value", "said"),
    [(0.8734, "87.3%"), (1.0, "100.0%"), (-0.5, "−50.0%"), (None, "–"), (math.nan, "not finite"), (99.0, "9,900%")],
)
def test_percent(value, said):
    assert words.percent(value) == said


@pytest.mark.parametrize(
    ("value", "said"),
    [(1.0, "×1.00"), (98.6, "×98.6"), (123.4, "×123.4"), (1234.0, "×1,234"), (math.inf, "∞"), (None, "–")],
)
def test_times(value, said):
    assert words.times(value) == said


def test_what_is_not_known_is_a_dash():
    assert (words.amount(None), words.duration(None)) == ("–", "–")
    assert words.amount(1_500_000) == "1.5M"


@pytest.mark.parametrize(("value", "said"), [(100, "100"), (1024, "1K"), (131072, "128K"), (2**20, "1024K")])
def test_context(value, said):
    assert words.context(value) == said


@pytest.mark.parametrize(
    ("value", "said"), [(0, "0"), (0.25, "0.25"), (1e-6, "1e-06"), (300_000, "300K"), (1_500_000, "1.5M"), (7, "7")]
)
def test_short(value, said):
    assert words.short(value) == said


@pytest.mark.parametrize(
    ("layers", "said"),
    [([], "none"), ([3], "3"), ([0, 1, 2], "0–2"), ([0, 1, 3, 4], "0–1 and 3–4"), ([1, 5, 9], "1, 5 and 9")],
)
def test_runs(layers, said):
    assert words.runs(layers) == said
