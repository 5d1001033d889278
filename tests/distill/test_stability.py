"""Exponents against recurrences whose own are known, against finite differences, and against what mixers expose."""

import math
from dataclasses import replace

import pytest
import torch

from distill import convert
from distill.errors import UserError
from distill.stability import followers, head_exponents, largest_exponent, memory_tokens, mixer_exponent
from tests.distill.mixers.test_mixers import HEAD, HEADS, STATE, hidden, make, mixed_and_values

LENGTH, SKIP = 160, 80
LEARNED = ["discrete_mamba2", "mamba2"]
"""Mixers of one decay a head that is learnt."""


def test_a_logistic_map_has_the_logarithm_of_two():
    """x ← 4 x (1 − x), the textbook's chaotic map: λ = ln 2."""
    start = torch.tensor([0.2137], dtype=torch.float64)
    found = largest_exponent(lambda x, _: 4 * x * (1 - x), start, range(1000))
    assert found == pytest.approx(math.log(2), abs=1e-2)


@pytest.mark.parametrize("largest", [1.05, 0.93])
def test_a_linear_recurrence_has_its_largest_eigenvalue(largest):
    """With a rotation of that size, in a basis that is far from orthogonal: no single step stretches by it."""
    turn = torch.tensor([[math.cos(1.0), -math.sin(1.0)], [math.sin(1.0), math.cos(1.0)]], dtype=torch.float64)
    torch.manual_seed(3)
    basis = torch.randn(4, 4, dtype=torch.float64)
    matrix = basis @ torch.block_diag(largest * turn, torch.tensor(0.6), torch.tensor(-0.8)).double() @ basis.inverse()
    state = torch.randn(4, dtype=torch.float64)
    found = largest_exponent(lambda s, _: matrix @ s, state, range(1000), skip=100)
    assert found == pytest.approx(math.log(largest), abs=1e-3)


def test_a_tangent_that_ends_is_told():
    start = torch.ones(2, dtype=torch.float64)
    assert largest_exponent(lambda s, _: 0 * s, start, range(5)) == -math.inf
    with pytest.raises(ValueError, match="skips 5 steps"):
        largest_exponent(lambda s, _: s, start, range(5), skip=5)


def decays(mixer, u, **sequence):
    return mixer.matrix_factors(u, **sequence).log_decay_BTH.detach()


def spread(name: str):
    """A mixer in which one head forgets much more slowly than the others, so that a tangent turns towards it."""
    mixer = make(name)
    with torch.no_grad():
        rate = mixer.A_log if name == "mamba2" else mixer.A_log_bias
        rate.copy_(torch.tensor([0.0, -4.0, 1.0]))
    return mixer


@pytest.mark.parametrize("name", LEARNED)
def test_a_mixers_memory_has_the_exponent_of_its_slowest_head(name):
    """Through the mixer's own cache, convolution included; of the same tokens, so exactly."""
    mixer, u = spread(name), hidden(LENGTH, batch=1)
    expected = decays(mixer, u)[0, SKIP + 1 :].mean(0)
    assert mixer_exponent(mixer, u, skip=SKIP) == pytest.approx(float(expected.max()), rel=1e-9)
    assert float(expected.max()) < 0
    assert int(expected.argmax()) == 1


def test_in_mamba2_it_is_the_rate_times_the_mean_step():
    mixer, u = spread("mamba2"), hidden(LENGTH, batch=1)
    factors = mixer.matrix_factors(u)
    expected = (-mixer.A_log.exp() * factors.step_BTH[0, SKIP + 1 :].mean(0)).max().detach()
    assert mixer_exponent(mixer, u, skip=SKIP) == pytest.approx(float(expected), rel=1e-9)


def growing(name: str, monkeypatch):
    """A mixer whose decay is turned over: what it remembers grows."""
    mixer = spread(name)
    terms_of = mixer._terms

    def turned(*args):
        terms, gate = terms_of(*args)
        return replace(terms, log_decay_BTH=-0.5 * terms.log_decay_BTH, rate_H=None), gate

    monkeypatch.setattr(mixer, "_terms", turned)
    return mixer


@pytest.mark.parametrize("name", LEARNED)
def test_a_mixer_that_is_not_stable_is_found_out(name, monkeypatch):
    mixer, u = growing(name, monkeypatch), hidden(60, batch=1)
    expected = decays(mixer, u)[0, 31:].mean(0).max()
    assert float(expected) > 0.05
    assert mixer_exponent(mixer, u, skip=30) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("name", LEARNED)
def test_a_tangent_is_what_two_trajectories_do(name):
    """Two states through the recurrence written out: how their distance shrinks."""
    mixer, u = spread(name), hidden(LENGTH, batch=1)
    with torch.no_grad():
        factors, x = mixer.matrix_factors(u), mixed_and_values(mixer, u)[1]
    step = 1 if factors.step_BTH is None else factors.step_BTH[..., None, None]
    written = step * x[..., None] * factors.B_BTHN[..., None, :]
    torch.manual_seed(4)
    near, far = torch.randn(2, HEADS, HEAD, STATE, dtype=torch.float64)
    apart = []
    for t in range(1, LENGTH):
        decay = factors.log_decay_BTH[0, t].exp()[:, None, None]
        near, far = decay * near + written[0, t], decay * far + written[0, t]
        apart.append(float((far - near).norm().log()))
    expected = (apart[-1] - apart[SKIP - 1]) / (len(apart) - SKIP)
    assert mixer_exponent(mixer, u, skip=SKIP) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("gain", [0.5, 2.5])
def test_a_recurrence_that_is_not_linear_against_two_trajectories(gain):
    """s ← tanh(W s + u), 10⁻⁷ apart and brought back to that after every step."""
    torch.manual_seed(7)
    weight = gain * torch.randn(16, 16, dtype=torch.float64) / 4
    inputs = 0.1 * torch.randn(400, 16, dtype=torch.float64)

    def step(state, given):
        return torch.tanh(weight @ state + given)

    near = torch.zeros(16, dtype=torch.float64)
    far, total = near + 1e-7 * torch.nn.functional.normalize(torch.randn(16, dtype=torch.float64), dim=0), 0.0
    for number, given in enumerate(inputs):
        near, far = step(near, given), step(far, given)
        growth = (far - near).norm() / 1e-7
        far = near + (far - near) / growth
        total += float(growth.log()) if number >= 100 else 0.0
    found = largest_exponent(step, torch.zeros(16, dtype=torch.float64), inputs, skip=100)
    assert found == pytest.approx(total / 300, abs=5e-3)  # they begin in different directions
    assert (found > 0) == (gain > 1)


def test_memory_in_tokens():
    """After τ tokens 1/e is left."""
    assert memory_tokens(-0.02) == pytest.approx(50)
    assert math.exp(-0.02 * memory_tokens(-0.02)) == pytest.approx(1 / math.e)
    assert memory_tokens(0.0) == memory_tokens(0.3) == math.inf


def packed(n_documents: int = 2) -> dict[str, torch.Tensor]:
    """Two rows of 24; the second ends in padding, and the first holds two documents."""
    torch.manual_seed(5)
    positions = torch.arange(24).repeat(2, 1)
    positions[0, 10:] -= 10 * (n_documents - 1)
    positions[1, 17:] -= 17
    valid = torch.ones(2, 24, dtype=torch.bool)
    valid[1, 17:] = False
    return {"input_ids": torch.randint(3, 97, (2, 24)), "position_ids": positions, "valid": valid}


def test_tokens_with_nothing_before_them_do_not_count():
    follows = followers(packed())
    expected = torch.ones(2, 24, dtype=torch.bool)
    expected[:, 0] = False
    expected[0, 10] = False
    expected[1, 17:] = False
    assert torch.equal(follows, expected)


@torch.no_grad()
def read(student, layer: int, ids: torch.Tensor) -> torch.Tensor:
    """What the mixer of a layer reads of one document."""
    found = []
    mixer = student.model.layers[layer].self_attn
    handle = mixer.register_forward_pre_hook(
        lambda _m, _a, kwargs: found.append(kwargs["hidden_states"]), with_kwargs=True
    )
    student(input_ids=ids[None], use_cache=False)
    handle.remove()
    return found[0]


@pytest.mark.parametrize("name", LEARNED)
def test_heads_of_a_student_document_by_document(name, tiny_model):
    """Packed and padded, as each document alone; of converted layers only."""
    student = convert(tiny_model("llama"), mixer=name, keep_attention=[1]).double()
    with torch.no_grad():
        for layer in (0, 2):
            student.model.layers[layer].self_attn.in_proj.weight.add_(0.05)
    batch = packed()
    alone = [batch["input_ids"][0, :10], batch["input_ids"][0, 10:], batch["input_ids"][1, :17]]
    sums = {
        layer: sum(
            decays(student.model.layers[layer].self_attn, read(student, layer, ids))[0, 1:].sum(0) for ids in alone
        )
        for layer in (0, 2)
    }
    count = sum(len(ids) - 1 for ids in alone)
    found = head_exponents(student, [batch])
    assert list(found) == [0, 2]
    for layer, of_heads in found.items():
        assert of_heads == pytest.approx((sums[layer] / count).tolist(), rel=1e-6)
        assert max(of_heads) < 0


def test_what_never_forgets_has_the_exponent_zero(tiny_model):
    student = convert(tiny_model("llama"), mixer="based", keep_attention=[1])
    assert head_exponents(student, [packed()]) == {layer: [0.0] * 4 for layer in (0, 2)}


@pytest.mark.parametrize("name", ["gated_deltanet", "sliding_window"])
def test_no_head_has_an_exponent_where_the_state_is_not_multiplied_by_a_number(name, tiny_model):
    assert head_exponents(convert(tiny_model("llama"), mixer=name, keep_attention=[1]), [packed()]) == {}


def test_the_delta_rule_is_followed_through_its_cache():
    """Keys of length 1 and β below 1: it never turns faster than it decays."""
    mixer = make("gated_deltanet")
    assert mixer_exponent(mixer, hidden(LENGTH, batch=1), skip=SKIP) < 0


def test_a_teacher_has_no_exponents(tiny_model):
    assert head_exponents(tiny_model("llama"), [packed()]) == {}


def test_a_text_of_single_tokens_is_refused(tiny_model):
    batch = packed()
    batch["position_ids"] = torch.zeros_like(batch["position_ids"])
    with pytest.raises(UserError, match="shorter than two tokens"):
        head_exponents(convert(tiny_model("llama")), [batch])
