"""Losses by position against one pass over the whole text, and the means of its parts."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from distill import convert
from distill.by_position import Bucket, by_context, by_position, contexts_for, edges_for, longest_context, losses
from tests.conftest import SHAPE, tiny

IDS = torch.randint(3, SHAPE["vocab_size"], (75,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.mark.parametrize("keep", [None, [1], []], ids=["teacher", "hybrid", "mamba"])
@torch.no_grad()
def test_chunks_give_what_one_pass_gives(keep, family):
    model = tiny(family).double()
    model = model if keep is None else convert(model, keep_attention=keep, seed=0).eval()
    logs = model(torch.tensor([IDS]), use_cache=False).logits[0].log_softmax(-1)
    expected = -logs[:-1].gather(1, torch.tensor(IDS)[1:, None])[:, 0]
    for chunk in (1, 7, 74, 512):
        found = losses(model, IDS, chunk)
        assert found.shape == (74,)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_no_logits_are_longer_than_a_chunk():
    model, widths = tiny("llama"), []
    model.lm_head.register_forward_hook(lambda _module, _given, logits: widths.append(logits.shape[1]))
    losses(model, IDS, 16)
    assert widths == [16, 16, 16, 16, 10]


def test_buckets_are_means_over_documents():
    documents = [torch.arange(1.0, 9.0), torch.arange(1.0, 9.0) + 2]  # from 1, 2, … 8 tokens of context
    assert by_position(documents, [0, 2, 8]) == [Bucket(0, 2, 2.5, 1.0), Bucket(2, 8, 6.5, 1.0)]
    assert by_position(documents[:1], [0, 1]) == [Bucket(0, 1, 1.0, None)]


def test_the_length_trained_on_is_an_edge():
    assert edges_for(64, 256) == [0, 16, 23, 32, 45, 64, 91, 128, 181, 256]
    for trained, longest in ((100, 1600), (512, 8192), (8, 128), (3000, 9000), (64, 64)):
        edges = edges_for(trained, longest)
        assert {0, trained, longest} <= set(edges)
        assert edges == sorted(set(edges))
    assert contexts_for(64, 300) == [8, 16, 32, 64, 128, 256, 300]


def test_the_same_tokens_from_more_context():
    model = tiny("llama")
    found = by_context(model, [IDS, IDS[::-1]], [4, 64], 10, chunk=16)
    for (context, loss), size in zip(found, (4, 64), strict=True):
        assert context == size
        ends = [losses(model, ids[-10 - size :])[-10:].mean() for ids in (IDS, IDS[::-1])]
        assert loss == pytest.approx(float(sum(ends) / 2), rel=1e-5)


def test_where_learned_positions_end():
    learned = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=2))
    assert longest_context(learned) == 32
    assert longest_context(tiny("llama")) is None
