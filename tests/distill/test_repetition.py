"""Repetition and diversity against counting by hand."""

import random

import pytest

from distill.repetition import distinct, longest_repeat, repeated


def test_repeated_and_distinct_by_hand():
    ids = [1, 2, 1, 2, 3]  # pairs: 12, 21, 12, 23
    assert repeated(ids, 1) == pytest.approx(2 / 5)
    assert repeated(ids, 2) == 1 / 4
    assert repeated(ids, 3) == 0
    assert repeated([1], 2) == 0
    assert distinct([[1, 2], [1, 2, 3]], 1) == 3 / 5
    assert distinct([[1, 2], [1, 2, 3]], 2) == 2 / 3
    assert distinct([[1]], 2) == 0


def test_longest_repeat_against_every_pair_of_places():
    draw = random.Random(0)
    for _ in range(200):
        ids = [draw.randrange(3) for _ in range(draw.randrange(14))]
        places = range(len(ids))
        stretches = [
            n
            for n in places
            for a in places
            for b in range(a + 1, len(ids) - n + 1)
            if ids[a : a + n] == ids[b : b + n]
        ]
        assert longest_repeat(ids) == max(stretches, default=0), ids
    assert longest_repeat([7] * 50) == 49
