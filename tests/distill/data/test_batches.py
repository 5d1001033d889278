from itertools import pairwise

import pytest
import torch

from distill.data import Blocks, TrainingBatches, evaluation_batches, prepare, split_documents, steps_for
from distill.errors import UserError

BLOCK = 64


@pytest.fixture(scope="module")
def folder(library, bpe, tmp_path_factory):
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("prepared")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<bos>")
    prepare(*split_documents(library[:8], fraction=0.4, by="tail"), tokenizer, folder, block=BLOCK)
    return folder


@pytest.fixture
def blocks(folder) -> Blocks:
    return Blocks(folder, "train", BLOCK)


@pytest.mark.parametrize("batch_size", [1, 7, 16])
def test_every_full_block_comes_once_an_epoch(blocks, batch_size):
    batches = TrainingBatches(blocks, batch_size, seed=3)
    n = blocks.n_full
    assert n < len(blocks), "the short block is what must not come"
    order = [index for step in range(3 * n // batch_size + 1) for index in batches.indices(step)]
    epochs = [order[:n], order[n : 2 * n], order[2 * n : 3 * n]]
    for epoch in epochs:
        assert sorted(epoch) == list(range(n))
    assert all(a != b for a, b in pairwise(epochs)), "each epoch has an order of its own"
    assert epochs[0] != sorted(epochs[0])


def test_any_step_can_be_asked_for_at_once(blocks):
    walked = TrainingBatches(blocks, 8, seed=0)
    steps = 2 * blocks.n_full // 8
    seen = [walked.batch(step) for step in range(steps)]
    fresh = TrainingBatches(blocks, 8, seed=0)
    for step in (steps - 1, 0, steps // 2):
        for name, tensor in fresh.batch(step).items():
            assert torch.equal(tensor, seen[step][name])


def test_the_order_is_decided_by_the_seed_alone(blocks):
    first = TrainingBatches(blocks, 8, seed=0).indices(0)
    torch.manual_seed(123)
    assert TrainingBatches(blocks, 8, seed=0).indices(0) == first
    assert TrainingBatches(blocks, 8, seed=1).indices(0) != first


def test_micro_batches_and_ranks_share_one_stream(blocks):
    """A step of 8 as 4 × 2 sees the same blocks: batch size may change with the machine."""
    whole, parts = TrainingBatches(blocks, 8, seed=0), TrainingBatches(blocks, 2, seed=0)
    for step in (0, 5):
        assert whole.indices(step) == [i for part in range(4) for i in parts.indices(4 * step + part)]


def test_blocks_cut_short_bring_the_same_text_in_the_same_order(blocks, folder):
    whole = TrainingBatches(blocks, 3, seed=2)
    short = TrainingBatches(Blocks(folder, "train", BLOCK // 4), 12, seed=2, together=4)
    assert short.n == 4 * whole.n
    for step in (0, 1, blocks.n_full // 3, 2 * blocks.n_full // 3):  # two epochs, and a batch across their border
        texts = [batches.batch(step)["input_ids"] for batches in (whole, short)]
        assert texts[1].shape == (12, BLOCK // 4)
        assert torch.equal(texts[0].flatten(), texts[1].flatten())
    assert short.first(40) == [index for step in range(4) for index in short.indices(step)][:40]


def test_evaluation_takes_every_token_in_order(blocks):
    batches = list(evaluation_batches(blocks, 5))
    assert sum(int(batch["valid"].sum()) for batch in batches) == blocks.n_tokens
    rows = torch.cat([batch["input_ids"] for batch in batches])
    assert torch.equal(rows, blocks.batch(range(len(blocks)))["input_ids"])


@pytest.mark.parametrize(("max_tokens", "rows"), [(1, 1), (BLOCK, 1), (BLOCK + 1, 2), (10 * BLOCK, 10)])
def test_evaluation_stops_at_its_budget(blocks, max_tokens, rows):
    batches = list(evaluation_batches(blocks, 4, max_tokens))
    assert sum(len(batch["input_ids"]) for batch in batches) == rows
    assert torch.equal(batches[0]["input_ids"][0], blocks[0]["input_ids"])


def test_steps_that_tokens_pay_for():
    assert steps_for(1_500_000, 16, 256) == 366
    assert steps_for(4096, 16, 256) == 1
    assert steps_for(100_000, 24, 256) == 16
    with pytest.raises(UserError, match="4095 tokens are less than one step of 4096"):
        steps_for(4095, 16, 256)


def test_impossible_batches_are_said(blocks, folder):
    with pytest.raises(UserError, match="at least 1"):
        TrainingBatches(blocks, 0, seed=0)
    with pytest.raises(UserError, match="less than one block"):
        TrainingBatches(Blocks(folder, "train", 10**9), 4, seed=0)
