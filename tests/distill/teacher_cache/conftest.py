"""A tiny random teacher and a text of random tokens."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.data import TrainingBatches
from distill.teacher_cache import Identity, TeacherCache

VOCABULARY, TOKENS, N_BLOCKS, K, SHARD_BLOCKS, SEED = 97, 16, 23, 8, 4, 3


class RandomBlocks:
    """What ``Blocks`` offers of a text, for one that lies in memory: two documents in each block."""

    block = TOKENS
    n_full = N_BLOCKS
    n_tokens = TOKENS * N_BLOCKS

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids_NT = torch.randint(VOCABULARY, (N_BLOCKS, TOKENS), generator=generator)

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        ids_BT = self.ids_NT[list(indices)]
        positions_T = torch.cat([torch.arange(6), torch.arange(TOKENS - 6)])
        return {
            "input_ids": ids_BT,
            "position_ids": positions_T.expand_as(ids_BT),
            "labels": ids_BT.masked_fill(positions_T == 0, -100),
            "valid": torch.ones_like(ids_BT, dtype=torch.bool),
        }


def identity(**other: object) -> Identity:
    facts = {
        "teacher": "t" * 64,
        "teacher_dtype": "float32",
        "text": "x" * 64,
        "block": TOKENS,
        "order": SEED,
        "vocabulary": VOCABULARY,
        "top_k": K,
        "shard_blocks": SHARD_BLOCKS,
    }
    return Identity(**{**facts, **other})


def cache_in(folder: Path, n_blocks: int = N_BLOCKS, **other: object) -> TeacherCache:
    order = TrainingBatches(RandomBlocks(), n_blocks, SEED).indices(0)
    return TeacherCache(folder, identity(**other), np.array(order))


@pytest.fixture
def blocks() -> RandomBlocks:
    return RandomBlocks()


@pytest.fixture
def cache(tmp_path) -> TeacherCache:
    return cache_in(tmp_path / "logits")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def never() -> None:
    raise AssertionError("the teacher was loaded though nothing is missing")
