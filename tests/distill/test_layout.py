import pytest

from distill.errors import UserError
from distill.layout import evenly_spaced, layer_kinds, resolve


def test_a_list_is_sorted():
    assert resolve(6, layers=[5, 2]) == [2, 5]
    assert resolve(6, layers=[]) == []


def test_a_pattern_repeats_over_the_depth():
    assert resolve(8, pattern="m m m a") == [3, 7]
    assert resolve(6, pattern="am") == [0, 2, 4]


def test_count_and_ratio_are_evenly_spaced():
    assert resolve(16, count=4) == [3, 7, 11, 15]  # where MOHAWK's Llama-1B hybrid keeps attention
    assert resolve(16, ratio=0.25) == [3, 7, 11, 15]
    assert resolve(5, count=0) == []
    assert resolve(5, count=5) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("n_layers", range(1, 20))
def test_even_spacing_is_distinct_and_in_range(n_layers):
    for count in range(n_layers + 1):
        kept = evenly_spaced(count, n_layers)
        assert len(set(kept)) == count
        assert all(0 <= index < n_layers for index in kept)


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ({"layers": [6]}, "layer 6; the teacher has 6 layers, numbered 0 to 5"),
        ({"layers": [-1]}, "layer -1"),
        ({"layers": [1, 1]}, "layer 1 more than once"),
        ({"pattern": "mmxa"}, "write m for a mixer and a for attention"),
        ({"pattern": "mmma"}, "do not repeat evenly over 6 layers"),
        ({"ratio": 1.5}, "between 0 and 1"),
        ({"count": 7}, "0 to 6"),
        ({}, "got none"),
        ({"count": 1, "ratio": 0.5}, "got ratio, count"),
    ],
)
def test_what_does_not_fit_is_refused(wanted, says):
    with pytest.raises(UserError, match=says):
        resolve(6, **wanted)


def test_layer_kinds_name_every_layer():
    assert layer_kinds(3, [1], "mamba2") == ["mamba2", "attention", "mamba2"]
