"""Queries and keys cut to fewer columns: the nearest scores, positions and biases included."""

import pytest
import torch
from torch import Tensor

from distill import convert
from distill.attention import AttentionView, views
from distill.calibration import calibrate
from distill.head_maps import HeadMap, nearest_scores
from distill.mixers import rotary
from distill.student import mixers_of
from tests.distill.families.models import built

H, P, D = 3, 8, 20


def drawn(seed: int, *, biased: bool) -> HeadMap:
    generator = torch.Generator().manual_seed(seed)
    weight, bias = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((H, P, D), (H, P)))
    return HeadMap(weight, bias if biased else None)


def scores(query: HeadMap, key: HeadMap) -> Tensor:
    """(H, D + 1, D + 1): what inputs with a 1 behind them are multiplied with on both sides."""
    return query.augmented().mT @ key.augmented()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("d", [1, 5, 7])
def test_no_other_scores_of_the_rank_are_nearer(d, biased):
    """Eckart and Young: what is left is as large as the singular values that are left out."""
    query, key = drawn(0, biased=biased), drawn(1, biased=False)
    whole, cut = scores(query, key), nearest_scores(query, key, d, turned=0)
    left = (whole - scores(*cut)).square().sum((1, 2)).sqrt()
    torch.testing.assert_close(left, torch.linalg.svdvals(whole)[:, d:].square().sum(-1).sqrt())
    assert [part.weight_HPD.shape for part in cut] == 2 * [(H, d, D)]
    assert all((part.bias_HP is not None) == biased for part in cut)


def test_columns_that_positions_turn_stay_what_they_are():
    query, key = drawn(0, biased=True), drawn(1, biased=True)
    rest = [HeadMap(part.weight_HPD[:, 4:], part.bias_HP[:, 4:]) for part in (query, key)]
    cut, apart = nearest_scores(query, key, 6, turned=4), nearest_scores(*rest, 2, turned=0)
    for before, after, alone in zip((query, key), cut, apart, strict=True):
        assert torch.equal(after.augmented()[:, :4], before.augmented()[:, :4])
        torch.testing.assert_close(after.augmented()[:, 4:], alone.augmented())


def test_more_columns_than_the_scores_have_rank_are_left_out():
    """A head wider than the hidden size, of which a state takes more columns than there are inputs."""
    query, key = (HeadMap(torch.randn(2, 12, 4, dtype=torch.float64), None) for _ in "qk")
    cut = nearest_scores(query, key, 9, turned=0)
    torch.testing.assert_close(scores(*cut), scores(query, key))
    assert cut[0].weight_HPD.shape[1] < 9


def test_a_state_between_the_hidden_size_and_a_head_is_seeded():
    convert(built("llama", {"hidden_size": 16, "head_dim": 24}), mixer="discrete_mamba2", state_dim=20)


@torch.no_grad()
@pytest.mark.parametrize("state_dim", [8, 12])
def test_partly_turned_heads_keep_more_of_their_scores_than_cut_off(state_dim):
    """Of 16 columns 8 are turned by their positions; beside the first 8 or 12 columns as they are."""
    rope = {"partial_rotary_factor": 0.5, "rope_type": "default", "rope_theta": 10000.0}
    teacher = built("phi", {"hidden_size": 64, "num_key_value_heads": 2, "rope_parameters": rope}).double()
    attention, rotation, hidden = read(teacher)
    mixer = mixers_of(convert(teacher, mixer="discrete_mamba2", state_dim=state_dim, rope="keep"))[0]
    terms, _ = mixer._terms(hidden, None, None, None, rotation)

    q_BTHP = attention.by_head(attention.q(hidden), attention.n_heads)
    k_BTHP = attention.per_query_head(attention.by_head(attention.k(hidden), attention.n_kv_heads), dim=2)
    cut_off = rotary.rotate(k_BTHP[..., :state_dim], q_BTHP[..., :state_dim], rotation)
    wanted = torch.einsum("bhtp,bhsp->bhts", *attention.queries_and_keys(hidden, rotation))
    ours, theirs = (
        relative_error(torch.einsum("bthn,bshn->bhts", read_BTHN, written_BTHN), wanted)
        for written_BTHN, read_BTHN in ((terms.B_BTHN, terms.C_BTHN), cut_off)
    )
    assert ours < (1.001 if state_dim == 8 else 0.9) * theirs  # 8 columns are the turned ones alone


@torch.no_grad()
def test_biases_of_queries_and_keys_outlive_the_cut():
    teacher = built("qwen2", {"hidden_size": 64, "num_key_value_heads": 2}).double()
    for name, parameter in teacher.named_parameters():
        if name.endswith(("q_proj.bias", "k_proj.bias")):
            parameter.normal_(std=1.0)
    attention, _, hidden = read(teacher)
    mixer = mixers_of(convert(teacher, mixer="discrete_mamba2", state_dim=attention.head_dim // 2))[0]
    wanted = torch.einsum("bhtp,bhsp->bhts", *attention.queries_and_keys(hidden, None))

    def error() -> float:
        terms, _ = mixer._terms(hidden, None, None, None)
        return relative_error(torch.einsum("bthn,bshn->bhts", terms.C_BTHN, terms.B_BTHN), wanted)

    with_biases = error()
    mixer.conv1d.bias.zero_()
    assert with_biases < 0.8 * error(), (with_biases, error())


def read(teacher) -> tuple[AttentionView, rotary.Rotation, Tensor]:
    """Layer 0's attention, and what it reads of an example."""
    trace = dict(calibrate(teacher, [0], seed=9))[0]
    return views(teacher, [0])[0], trace.position_embeddings, trace.attention_input


def relative_error(ours: Tensor, wanted: Tensor) -> float:
    """Of causal scores, each head's brought to the size that fits best."""
    causal = torch.ones(wanted.shape[-2:], dtype=torch.bool).tril()
    ours, wanted = ours[..., causal], wanted[..., causal]
    best = (ours * wanted).sum((0, 2)) / ours.square().sum((0, 2))
    return float((best[:, None] * ours - wanted).norm() / wanted.norm())
