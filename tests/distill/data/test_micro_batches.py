"""How a step's sequences are cut up, over processes and forward passes."""

import pytest

from distill.data import micro_batches
from distill.errors import UserError


@pytest.mark.parametrize(
    ("batch_size", "at_most", "ranks", "expected"),
    [
        (8, None, 1, (8, 1)),
        (8, None, 2, (4, 1)),
        (8, None, 8, (1, 1)),
        (9, None, 3, (3, 1)),
        (8, 8, 1, (8, 1)),
        (8, 4, 1, (4, 2)),
        (8, 1, 1, (1, 8)),
        (8, 1, 4, (1, 2)),
        (8, 100, 2, (4, 1)),
        (12, 4, 2, (3, 2)),  # six for each, of which four cannot be had without a rest
        (7, 4, 1, (1, 7)),
        (1, None, 1, (1, 1)),
    ],
)
def test_cuts(batch_size, at_most, ranks, expected):
    assert micro_batches(batch_size, at_most, ranks) == expected


@pytest.mark.parametrize("ranks", range(1, 9))
def test_every_cut_is_whole_and_as_large_as_it_may_be(ranks):
    for share in range(1, 13):
        for at_most in (None, *range(1, 15)):
            size, passes = micro_batches(share * ranks, at_most, ranks)
            assert size * passes == share
            limit = share if at_most is None else at_most
            assert size == max(n for n in range(1, limit + 1) if share % n == 0)


@pytest.mark.parametrize(
    ("batch_size", "ranks", "near"), [(8, 3, 9), (7, 2, 8), (1, 2, 2), (2, 4, 4), (10, 4, 8), (13, 5, 15)]
)
def test_what_processes_cannot_share_evenly_is_refused(batch_size, ranks, near):
    said = rf"batch_size is {batch_size}, which {ranks} processes cannot share evenly; {near} they can"
    with pytest.raises(UserError, match=said):
        micro_batches(batch_size, None, ranks)
    with pytest.raises(UserError, match=said):
        micro_batches(batch_size, 1, ranks)
    assert near % ranks == 0
