"""Which blocks make which batch: a seeded permutation, open at any step, so that resuming is one integer."""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from torch import Tensor

from distill.data.blocks import Blocks
from distill.errors import UserError


class TrainingBatches:
    """Endless batches of full blocks, each block once an epoch, in an order that (seed, epoch) alone decides.

    Batch ``step`` holds the blocks from place ``step * batch_size`` on, in all epochs laid end to end. So none
    is dropped where an epoch does not divide into batches: its last batch is filled up from the next epoch.
    """

    def __init__(self, blocks: Blocks, batch_size: int, seed: int) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}; allowed: at least 1")
        if not blocks.n_full:
            raise UserError(f"the text has {blocks.n_tokens} tokens, less than one block of {blocks.block}")
        self.blocks = blocks
        self.batch_size = batch_size
        self.seed = seed

    def indices(self, step: int) -> list[int]:
        """The blocks of batch ``step``, counted from 0."""
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        n = self.blocks.n_full
        return [int(_permutation(n, self.seed, place // n)[place % n]) for place in places]

    def batch(self, step: int) -> dict[str, Tensor]:
        """Batch ``step`` as in ``Blocks.batch``; the same whatever was asked for before."""
        return self.blocks.batch(self.indices(step))


def evaluation_batches(blocks: Blocks, batch_size: int, max_tokens: int | None = None) -> Iterator[dict[str, Tensor]]:
    """The blocks in order, the short last one included, until ``max_tokens`` are reached (None: all)."""
    n = len(blocks) if max_tokens is None else min(len(blocks), -(-max_tokens // blocks.block))
    for first in range(0, n, batch_size):
        yield blocks.batch(range(first, min(first + batch_size, n)))


def steps_for(tokens: int, batch_size: int, block: int, accumulate: int = 1, *, ranks: int = 1) -> int:
    """Optimizer steps that ``tokens`` pay for, rounded down; raises UserError if that is none."""
    tokens_per_step = batch_size * block * accumulate * ranks
    steps = tokens // tokens_per_step
    if steps < 1:
        raise UserError(
            f"{tokens} tokens are less than one step of {tokens_per_step} (batch_size {batch_size} × block "
            f"{block} × accumulate {accumulate} × {ranks} processes); raise tokens or lower batch_size"
        )
    return steps


@lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    # NumPy keeps the raw streams of its bit generators the same in every version, unlike Generator's methods.
    return np.argsort(np.random.PCG64([seed, epoch]).random_raw(n), kind="stable")
