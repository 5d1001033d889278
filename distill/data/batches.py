"""Which blocks make which batch: a seeded permutation, open at any step, so that resuming is one integer."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np
from torch import Tensor

from distill.errors import UserError


class Rows(Protocol):
    """What batches are made of: token blocks (``Blocks``) or image-text rows (``ImageTextRows``).

    Attributes:
        block: the most tokens a row has.
        n_full: rows without padding of a last one that is cut short; training reads these.
        n_tokens: of all rows.
        fingerprint: changes when a batch may.
    """

    block: int
    n_full: int
    n_tokens: int
    fingerprint: str

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]: ...


class TrainingBatches:
    """Endless batches of full blocks, each block once an epoch, in an order that (seed, epoch) alone decides.

    Batch ``step`` holds the blocks from place ``step * batch_size`` on, in all epochs laid end to end. So none
    is dropped where an epoch does not divide into batches: its last batch is filled up from the next epoch.

    Short blocks may stay ``together``: k of them that stand side by side in the text come one after another, and
    it is these groups that are drawn. So blocks cut into k bring the same text in the same order as whole ones.

    Attributes:
        n: blocks an epoch.
    """

    def __init__(self, blocks: Rows, batch_size: int, seed: int, together: int = 1) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}; allowed: at least 1")
        if blocks.n_full < together:
            raise UserError(f"the text has {blocks.n_tokens} tokens, less than one block of {together * blocks.block}")
        self.blocks = blocks
        self.batch_size = batch_size
        self.seed = seed
        self.together = together
        self.n = blocks.n_full // together * together

    def indices(self, step: int) -> list[int]:
        """The blocks of batch ``step``, counted from 0."""
        return [self._block(place) for place in range(step * self.batch_size, (step + 1) * self.batch_size)]

    def first(self, number: int) -> list[int]:
        """The first so many blocks, whatever the batches."""
        return [self._block(place) for place in range(number)]

    def _block(self, place: int) -> int:
        """The block at a place of all epochs laid end to end."""
        epoch, place = divmod(place, self.n)
        group, within = divmod(place, self.together)
        return int(_permutation(self.n // self.together, self.seed, epoch)[group]) * self.together + within

    def batch(self, step: int) -> dict[str, Tensor]:
        """Batch ``step`` as in ``batch`` of the rows; the same whatever was asked for before."""
        return self.blocks.batch(self.indices(step))


def evaluation_batches(blocks: Rows, batch_size: int, max_tokens: int | None = None) -> Iterator[dict[str, Tensor]]:
    """The blocks in order, the short last one included, until ``max_tokens`` are reached (None: all)."""
    n = len(blocks) if max_tokens is None else min(len(blocks), -(-max_tokens // blocks.block))
    for first in range(0, n, batch_size):
        yield blocks.batch(range(first, min(first + batch_size, n)))


def steps_for(tokens: int, batch_size: int, block: int) -> int:
    """Optimizer steps that ``tokens`` pay for, rounded down; raises UserError if that is none."""
    steps = tokens // (batch_size * block)
    if steps < 1:
        raise UserError(
            f"{tokens} tokens are less than one step of {batch_size * block} (batch_size {batch_size} × block"
            f" {block}); raise tokens or lower batch_size"
        )
    return steps


def micro_batches(batch_size: int, at_most: int | None, ranks: int) -> tuple[int, int]:
    """How a step's sequences are cut up: (sequences a forward pass on a process, forward passes a step).

    Args:
        batch_size: sequences a step, over all processes.
        at_most: sequences a forward pass may take; None for all that fall to a process.
        ranks: processes that share the step.

    Raises:
        UserError: the processes cannot share it evenly.
    """
    share, rest = divmod(batch_size, ranks)
    if rest or not share:
        near = max(ranks, round(batch_size / ranks) * ranks)
        raise UserError(f"batch_size is {batch_size}, which {ranks} processes cannot share evenly; {near} they can")
    size = next(size for size in range(min(share, at_most or share), 0, -1) if share % size == 0)
    return size, share // size


@lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    # NumPy keeps the raw streams of its bit generators the same in every version, unlike Generator's methods.
    return np.argsort(np.random.PCG64([seed, epoch]).random_raw(n), kind="stable")
