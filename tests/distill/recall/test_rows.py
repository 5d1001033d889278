"""The tasks in ids: what is asked can be answered from the prompt, by other means than those that made it."""

import numpy as np
import pytest

from distill.errors import UserError
from distill.recall import TASKS, row_examples
from distill.recall.rows import (
    DIGITS,
    NOTHING,
    PERMUTATIONS,
    S5,
    SMALLEST,
    associative,
    copying,
    passkey,
    permutation,
    phonebook,
)

V = 512
HALF = V // 2


def draws(number: int) -> list[np.random.Generator]:
    return [np.random.default_rng([7, i]) for i in range(number)]


@pytest.mark.parametrize(("items", "length"), [(1, 4), (4, 64), (16, 64), (32, 256)])
def test_associative_recall_is_that_of_zoology(items, length):
    for rng in draws(8):
        row = associative(rng, items, length, V)
        ids, labels, context = np.array(row.ids), row.labels(), 2 * items
        keys, values = ids[0:context:2], ids[1:context:2]
        assert len(ids) == length
        assert len(set(keys)) == len(set(values)) == items
        assert keys.min() >= 1
        assert keys.max() < HALF <= values.min()
        (queries,) = np.nonzero(labels != NOTHING)
        assert len(queries) == items
        assert (queries >= context).all()
        assert (queries % 2 == 0).all()
        assert sorted(ids[queries]) == sorted(keys)
        assert [labels[at] for at in queries] == [dict(zip(keys, values, strict=True))[ids[at]] for at in queries]


def test_the_gaps_of_associative_recall_follow_a_power_law():
    """One pair has the first gap alone: P(gap = i) ∝ i^(0.01 − 1)."""
    slots = 8
    gaps = [(associative(rng, 1, 2 + 2 * slots, V).asks[0].at - 2) // 2 for rng in draws(3000)]
    found = np.bincount(gaps, minlength=slots) / 3000
    expected = np.arange(1, slots + 1) ** -0.99
    np.testing.assert_allclose(found, expected / expected.sum(), atol=0.03)


def test_any_query_may_be_the_one_that_is_examined():
    sources = {associative(rng, 4, 32, V).asks[-1].source for rng in draws(60)}
    assert sources == {1, 3, 5, 7}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("items", [1, 3])
def test_examples_of_every_task(task, items):
    for length in (0, 64):
        examples = row_examples(task, items, length, samples=12, seed=3, vocabulary=V)
        assert examples == row_examples(task, items, length, samples=12, seed=3, vocabulary=V)
        assert examples[:5] == row_examples(task, items, length, samples=5, seed=3, vocabulary=V)
        assert examples != row_examples(task, items, length, samples=12, seed=4, vocabulary=V)
        assert len({example.label for example in examples}) > 1
        for example in examples:
            assert len(set(example.choices)) == len(example.choices) == (2 if task == "parity" else 4)
            assert {len(choice) for choice in example.choices} == {len(example.answer)}
            assert min(sum(example.choices, ())) >= HALF
            if length and task != "associative":
                assert len(example.prompt) == length
            if task in ("associative", "phonebook", "passkey", "copying"):
                start = len(example.prompt) - example.distance
                assert example.prompt[start : start + len(example.answer)] == example.answer


def test_a_phone_book_is_looked_up_by_both_names():
    for rng in draws(20):
        row = phonebook(rng, 6, 100, V, shots=3)
        *earlier, last = row.asks
        prompt, labels = row.ids[: last.at + 1], row.labels()
        name = prompt[-2:]
        places = [at for at in range(len(prompt) - 2) if prompt[at : at + 2] == name]
        assert prompt[places[0] + 2 : places[0] + 6] == last.answer
        assert len(places) == 1
        assert len(earlier) == 3
        for ask in earlier:
            assert row.ids[ask.at + 1 : ask.at + 5] == ask.answer == row.ids[ask.source : ask.source + 4]
        assert (labels != NOTHING).sum() == 4 * 4
        assert tuple(labels[-4:]) == last.answer


def test_pass_keys_and_copies_stand_where_they_are_said_to():
    for rng in draws(20):
        row = passkey(rng, 3, 60, V)
        (ask,) = row.asks
        assert row.ids[ask.source - 2 : ask.source] == row.ids[ask.at - 1 : ask.at + 1]
        row = copying(rng, 5, 40, V)
        (ask,) = row.asks
        assert row.ids[ask.source : ask.source + 5] == ask.answer == (*row.ids[ask.at + 1 :], ask.answer[-1])


def test_noise_lies_anywhere_between_the_items():
    found = [one.distance for one in row_examples("copying", 2, 45, samples=400, seed=0, vocabulary=V)]
    thirds = np.histogram(found, bins=3, range=(4, 44))[0]
    np.testing.assert_allclose(thirds / 400, 1 / 3, atol=0.07)


def test_parity_counts_the_ones():
    for example in row_examples("parity", 9, 30, samples=20, seed=0, vocabulary=V):
        assert example.answer == (HALF + example.prompt.count(HALF + 1) % 2,)
        assert example.prompt.count(HALF) + example.prompt.count(HALF + 1) == 9


def test_permutations_are_multiplied_in_order():
    """Against products of matrices: P_n ⋯ P_1."""
    first = HALF + DIGITS
    for rng in draws(20):
        row = permutation(rng, 5, 12, V)
        product = np.eye(5, dtype=int)
        for token in row.ids:
            if first <= token < first + PERMUTATIONS:
                product = np.eye(5, dtype=int)[list(S5[token - first])].T @ product
        (ask,) = row.asks
        image = S5[ask.answer[0] - first]
        assert (product == np.eye(5, dtype=int)[list(image)].T).all()


@pytest.mark.parametrize(
    ("task", "items", "length", "vocabulary", "says"),
    [
        ("associative", 17, 64, V, "17 items need 68 tokens and the length is 64"),
        ("associative", 4, 65, V, "must be even"),
        ("associative", 256, 0, V, "it has 1 to 255"),
        ("phonebook", 300, 0, V, "it has 1 to 256"),
        ("phonebook", 8, 16, V, "give a greater length"),
        ("passkey", 0, 64, V, "it has 1 to 16"),
        ("parity", 0, 64, V, "it has at least 1"),
        ("copying", 4, 32, SMALLEST - 1, "too small"),
        ("phonbook", 4, 32, V, "choose from associative, phonebook"),
    ],
)
def test_what_cannot_be_drawn_is_refused(task, items, length, vocabulary, says):
    with pytest.raises(UserError, match=says):
        row_examples(task, items, length, samples=1, seed=0, vocabulary=vocabulary)
