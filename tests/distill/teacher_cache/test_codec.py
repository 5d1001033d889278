"""A record holds what its documentation says, within the errors that it gives."""

import math
import struct

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.objectives.topk import TopK, top_k_and_tail
from distill.teacher_cache import Codec

K = 64
SIZES = {512: 196, 32_000: 196, 65_536: 196, 65_537: 197, 128_256: 197, 151_936: 198, 262_144: 199, 327_680: 200}


def zipf_logits(vocabulary: int, positions: int = 32, seed: int = 0) -> Tensor:
    """(positions, 1, V) logits like a language model's: a few likely tokens, a long tail, anywhere among the ids."""
    generator = torch.Generator().manual_seed(seed)
    slope_N1 = 0.8 + 1.4 * torch.rand(positions, 1, generator=generator)
    noise_NV = torch.randn(positions, vocabulary, generator=generator)
    return (noise_NV - slope_N1 * (1 + torch.rand(positions, vocabulary, generator=generator) * vocabulary).log())[
        :, None
    ]


def there_and_back(codec: Codec, top: TopK) -> TopK:
    return codec.decode(np.frombuffer(codec.encode(top).tobytes(), codec.record).reshape(top.log_tail_BT.shape))


def by_id(top: TopK) -> TopK:
    order = top.ids_BTK.argsort(-1)
    return TopK(top.ids_BTK.gather(-1, order), top.log_probs_BTK.gather(-1, order), top.log_tail_BT)


def mass(top: TopK) -> Tensor:
    return top.log_probs_BTK.double().exp().sum(-1) + top.log_tail_BT.double().exp()


def require_within_bounds(got: TopK, top: TopK) -> None:
    """Ids exactly; distances to the best within half a step of the code; the tail as fp16 has it; the sum 1."""
    top = by_id(top)
    assert torch.equal(got.ids_BTK, top.ids_BTK)
    given, kept = (x.max(-1, keepdim=True).values - x for x in (top.log_probs_BTK.double(), got.log_probs_BTK.double()))
    given = given.clamp(max=64)
    span = given.max(-1, keepdim=True).values
    bound = (given * span).sqrt() / 255 + span / 260_100 + 2**-11 * span * (given == span) + 1e-5
    assert ((given - kept).abs() <= bound).all()
    torch.testing.assert_close(got.log_tail_BT, top.log_tail_BT, rtol=2**-11, atol=6e-8)
    torch.testing.assert_close(mass(got), torch.ones_like(mass(got)), rtol=0, atol=2e-6)


@pytest.mark.parametrize("vocabulary", SIZES)
def test_a_record_takes_at_most_200_bytes(vocabulary):
    codec = Codec(vocabulary, K)
    top = top_k_and_tail(torch.zeros(2, 3, vocabulary), K)
    assert len(codec.encode(top).tobytes()) == 6 * SIZES[vocabulary]
    assert SIZES[vocabulary] <= 200


@pytest.mark.parametrize("vocabulary", SIZES)
def test_there_and_back(vocabulary):
    codec = Codec(vocabulary, K)
    logits = zipf_logits(vocabulary)
    # The borders of the ranges of ids are among the kept ones of some positions.
    borders = [border for border in (0, 65_535, 65_536, 131_071, 131_072, vocabulary - 1) if border < vocabulary]
    logits[:8, :, borders] += 20
    top = top_k_and_tail(logits, K)
    require_within_bounds(there_and_back(codec, top), top)


@pytest.mark.parametrize("k", [1, 8, 255])
@pytest.mark.parametrize("vocabulary", [512, 70_000])
def test_other_numbers_of_tokens(k, vocabulary):
    top = top_k_and_tail(zipf_logits(vocabulary), k)
    require_within_bounds(there_and_back(Codec(vocabulary, k), top), top)


@pytest.mark.parametrize("vocabulary", [40, 64])
def test_a_vocabulary_of_at_most_k_tokens_has_no_tail(vocabulary):
    codec = Codec(vocabulary, K)
    assert (codec.k, codec.record.itemsize) == (vocabulary, 3 * vocabulary + 4)
    top = top_k_and_tail(zipf_logits(vocabulary), K)
    got = there_and_back(codec, top)
    assert (got.log_tail_BT == -math.inf).all()
    assert torch.equal(got.ids_BTK, torch.arange(vocabulary).expand_as(got.ids_BTK))
    require_within_bounds(got, TopK(top.ids_BTK, top.log_probs_BTK, torch.full_like(top.log_tail_BT, -math.inf)))


def test_bytes_are_laid_out_as_documented():
    """Read with struct, field by field."""
    vocabulary, k = 200_000, 3
    top = TopK(
        torch.tensor([[[140_000, 7, 65_600]]]),
        torch.tensor([[[0.5, 0.25, 0.125]]]).log(),
        torch.tensor([[0.125]]).log(),
    )
    raw = Codec(vocabulary, k).encode(top).tobytes()
    *low, count_0, count_1, count_2, code_0, code_1, code_2, span, log_tail = struct.unpack("<3H3B3B2e", raw)
    assert low == [7, 65_600 - 65_536, 140_000 - 131_072]
    assert (count_0, count_1, count_2) == (1, 1, 1)
    assert span == np.float16(math.log(4))
    assert log_tail == np.float16(math.log(0.125))
    assert (code_0, code_1, code_2) == (round(255 * math.sqrt(0.5)), 255, 0)


def test_ties_keep_their_tokens_and_equal_probabilities():
    logits = torch.zeros(1, 4, 100_000)
    logits[..., [99_999, 3, 65_536, 70_000, 65_535]] = 12
    top = top_k_and_tail(logits, 5)
    got = there_and_back(Codec(100_000, 5), top)
    assert got.ids_BTK.unique().tolist() == [3, 65_535, 65_536, 70_000, 99_999]
    assert torch.equal(got.log_probs_BTK, got.log_probs_BTK[..., :1].expand_as(got.log_probs_BTK))
    require_within_bounds(got, top)


def test_a_teacher_that_knows_nothing():
    """All mass is in the tail, and the little that is not survives."""
    top = top_k_and_tail(torch.zeros(1, 2, 262_144), 64)
    got = there_and_back(Codec(262_144, 64), top)
    torch.testing.assert_close(got.log_probs_BTK, top.log_probs_BTK, rtol=1e-3, atol=0)


def test_a_teacher_that_is_certain():
    logits = torch.zeros(1, 2, 1000)
    logits[..., 5] = 80.0
    got = there_and_back(Codec(1000, 64), top_k_and_tail(logits, 64))
    assert -1e-20 < got.log_probs_BTK.max() <= 0
    torch.testing.assert_close(got.log_tail_BT, torch.full((1, 2), math.log(936) - 80), rtol=1e-3, atol=0)


@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_extreme_logits(scale):
    top = top_k_and_tail(scale * torch.randn(2, 5, 300, generator=torch.Generator().manual_seed(0)), 64)
    got = there_and_back(Codec(300, 64), top)
    assert not any(x.isnan().any() for x in got)
    torch.testing.assert_close(mass(got), torch.ones(2, 5, dtype=torch.float64))
    best = by_id(top).log_probs_BTK.argmax(-1)
    assert torch.equal(got.log_probs_BTK.argmax(-1), best)


def test_a_token_that_is_ruled_out_does_not_coarsen_the_others():
    logits = zipf_logits(100)
    logits[..., 60:] = -1e9
    top = top_k_and_tail(logits, 64)
    got, kept = there_and_back(Codec(100, 64), top), by_id(top).log_probs_BTK
    likely = kept > -5
    assert (got.log_probs_BTK - kept)[likely].abs().max() < 0.08
    assert (got.log_probs_BTK[kept < -1e6] < -60).all()


def test_bf16_logits():
    logits = zipf_logits(5000).bfloat16()
    top = top_k_and_tail(logits, 64)
    exact = logits.double().log_softmax(-1)
    torch.testing.assert_close(top.log_probs_BTK.double(), exact.gather(-1, top.ids_BTK), rtol=0, atol=1e-5)
    require_within_bounds(there_and_back(Codec(5000, 64), top), top)


def test_what_was_coded_is_coded_again_to_the_same_bytes():
    codec = Codec(1000, 64)
    records = codec.encode(top_k_and_tail(zipf_logits(1000), 64))
    again = codec.encode(codec.decode(records))
    assert np.array_equal(again["low"], records["low"])
    assert np.array_equal(again["log_tail"], records["log_tail"])
    assert np.abs(again["codes"].astype(int) - records["codes"]).max() <= 1
