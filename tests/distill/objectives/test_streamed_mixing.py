"""streamed_mixing_distance beside both matrices written out: values and every gradient, in fp64."""

import pytest
import torch
from torch import Tensor

from distill.objectives import streamed_mixing_distance, strips
from distill.ssd.factors import MatrixFactors
from tests.distill.objectives.matrix_pairs import cast, distance_written_out, given, random_pair

FORMS = ("unsquared", "squared", "row_normalised")


@pytest.fixture(params=[2**4, 2**12, 2**30], ids=["head by head", "some heads", "whole batch"])
def small_strips(request, monkeypatch) -> None:
    """Four rows a strip, so that a few tokens have several; as many heads as fit."""
    monkeypatch.setattr(strips, "ROWS", {"cpu": 4})
    monkeypatch.setattr(strips, "_STRIP_BYTES", {"cpu": request.param})


def equal(factors: MatrixFactors, q: Tensor, k: Tensor, valid: Tensor | None = None, **settings: object) -> None:
    ours = streamed_mixing_distance(factors, q, k, valid, scaling=0.4, **settings)
    theirs = distance_written_out(factors, q, k, valid, scaling=0.4, **settings)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    pairs = zip(torch.autograd.grad(ours, given(factors)), torch.autograd.grad(theirs, given(factors)), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10 * float(theirs.abs().max()))


def documents(length: int) -> Tensor:
    """Two rows: borders inside strips and between them, and a document of a single token."""
    position = torch.arange(length)
    return torch.stack([(position >= 3).long() + (position >= 4).long(), 7 - position // 6])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [1, 2, 4, 5, 13, 16])
def test_every_length(small_strips, length, form):
    equal(*random_pair(length), form=form)


@pytest.mark.parametrize("keys", [1, 2, 6])
def test_query_heads_that_share_keys(small_strips, keys):
    equal(*random_pair(11, heads=6, keys=keys))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("step", "skip"), [(False, True), (True, False), (False, False)])
def test_factors_that_are_not_there(small_strips, step, skip, form):
    equal(*random_pair(9, step=step, skip=skip), form=form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [1, 3, 4, 6, 40])
def test_windows_and_capped_scores(small_strips, window, softcap, form):
    equal(*random_pair(14), window=window, softcap=softcap, form=form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("window", [None, 3])
def test_documents(small_strips, window, form):
    equal(*random_pair(15), document_BT=documents(15), window=window, form=form)


PADDING = {
    "right": [[1] * 9 + [0] * 4, [1] * 13],
    "left": [[0] * 5 + [1] * 8, [0] * 2 + [1] * 11],
    "between": [[1] * 3 + [0] * 4 + [1] * 6, [0, 1] * 6 + [0]],
    "a whole row": [[0] * 13, [1] * 12 + [0]],
    "none": [[1] * 13] * 2,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("padding", PADDING)
def test_padding(small_strips, padding, packed, form):
    valid = torch.tensor(PADDING[padding], dtype=torch.bool)
    equal(*random_pair(13), valid, document_BT=documents(13) if packed else None, form=form)


def test_what_stands_at_padding_does_not_matter():
    valid = torch.tensor([[1] * 6 + [0] * 3, [1] * 9], dtype=torch.bool)
    clean, q, k = random_pair(9)
    expected = streamed_mixing_distance(clean, q, k, valid, scaling=0.4)
    with torch.no_grad():
        for factor in (clean.B_BTHN, clean.C_BTHN, clean.step_BTH):
            factor[~valid] = torch.nan
        for projected in (q, k):
            projected.transpose(1, 2)[~valid] = torch.nan
    loss = streamed_mixing_distance(clean, q, k, valid, scaling=0.4)
    loss.backward()
    assert torch.equal(loss, expected)
    assert all(factor.grad.isfinite().all() for factor in given(clean))
    assert all((factor.grad[~valid] == 0).all() for factor in given(clean)[1:4])


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_the_value(small_strips, form):
    """Beside finite differences, which know nothing of either implementation."""
    factors, q, k = random_pair(6, heads=2, keys=1)

    def loss(*tensors: Tensor) -> Tensor:
        return streamed_mixing_distance(MatrixFactors(*tensors), q, k, scaling=0.4, form=form)

    assert torch.autograd.gradcheck(loss, given(factors))


@pytest.mark.parametrize("form", FORMS)
def test_equal_matrices_have_distance_and_gradient_zero(small_strips, form):
    """Attention that sees one token has the identity as its matrix; so has a mixer that writes nothing."""
    factors, q, k = random_pair(9)
    with torch.no_grad():
        factors.B_BTHN.zero_()
        factors.skip_H.fill_(1)
    loss = streamed_mixing_distance(factors, q, k, scaling=0.4, window=1, form=form)
    loss.backward()
    assert loss.item() == 0
    assert all(torch.equal(factor.grad, torch.zeros_like(factor)) for factor in given(factors))


def test_one_equal_head_among_others_keeps_its_zero():
    factors, q, k = random_pair(9)
    with torch.no_grad():
        factors.B_BTHN[:, :, 1] = 0
        factors.skip_H[1] = 1
    streamed_mixing_distance(factors, q, k, scaling=0.4, window=1).backward()
    for factor in (factors.B_BTHN, factors.C_BTHN, factors.log_decay_BTH, factors.step_BTH):
        assert (factor.grad[:, :, 1] == 0).all()
        assert factor.grad.isfinite().all()
    assert factors.skip_H.grad.count_nonzero() == 3


@pytest.mark.parametrize("decay", [5e-4, 1e-2, 0.3, 5.0, 40.0])
def test_fp32_is_as_good_far_from_the_diagonal_as_near_it(decay):
    """2048 tokens whose cumulative log decay reaches from -1 to -65,000, beside the matrices in fp64."""
    exact, q, k = random_pair(2048, batch=1, heads=2, width=16, state=16, decay=decay)
    factors = cast(exact, torch.float32)
    exact = cast(factors, torch.float64)
    q, k = q.float(), k.float()
    ours = streamed_mixing_distance(factors, q, k, scaling=0.25)
    theirs = distance_written_out(exact, q.double(), k.double(), scaling=0.25)
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    ours.backward()
    theirs.backward()
    for ours, theirs in zip(given(factors), given(exact), strict=True):
        error = torch.linalg.vector_norm(ours.grad.double() - theirs.grad) / torch.linalg.vector_norm(theirs.grad)
        assert error < 2e-5


def test_autocast_changes_nothing():
    factors, q, k = random_pair(40)
    factors, q, k = cast(factors, torch.bfloat16), q.bfloat16(), k.bfloat16()
    plain = streamed_mixing_distance(factors, q, k, scaling=0.4)
    plain_gradients = torch.autograd.grad(plain, given(factors))
    with torch.autocast("cpu", torch.bfloat16):
        loss = streamed_mixing_distance(factors, q, k, scaling=0.4)
        gradients = torch.autograd.grad(loss, given(factors))
    assert torch.equal(loss, plain)
    assert loss.dtype == torch.float32
    exact = cast(factors, torch.float64)
    expected = distance_written_out(exact, q.double(), k.double(), scaling=0.4)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for ours, same, theirs in zip(gradients, plain_gradients, torch.autograd.grad(expected, given(exact)), strict=True):
        assert ours.dtype == torch.bfloat16
        assert torch.equal(ours, same)
        # One rounding to bfloat16, after the sum.
        torch.testing.assert_close(ours.double(), theirs, rtol=2**-8, atol=1e-6)


def test_a_sum_is_over_sequences_of_the_mean_over_heads():
    factors, q, k = random_pair(9)
    mean, total = (streamed_mixing_distance(factors, q, k, scaling=0.4, reduction=r) for r in ("mean", "sum"))
    torch.testing.assert_close(total, 2 * mean)


def test_backward_can_be_run_again_and_scales():
    factors, q, k = random_pair(9)
    loss = streamed_mixing_distance(factors, q, k, scaling=0.4)
    once = torch.autograd.grad(loss, given(factors), retain_graph=True)
    thrice = torch.autograd.grad(3 * loss, given(factors))
    for a, b in zip(once, thrice, strict=True):
        torch.testing.assert_close(3 * a, b)


def test_without_a_need_no_gradient_is_formed(monkeypatch):
    factors, q, k = random_pair(9)
    expected = streamed_mixing_distance(factors, q, k, scaling=0.4)
    monkeypatch.setattr(strips, "_add_gradients", None)  # calling it would raise
    with torch.no_grad():
        assert torch.equal(streamed_mixing_distance(factors, q, k, scaling=0.4), expected)
    constant = MatrixFactors(*(factor.detach() for factor in given(factors)))
    assert torch.equal(streamed_mixing_distance(constant, q, k, scaling=0.4), expected)


def test_one_factor_alone_gets_its_gradient():
    factors, q, k = random_pair(9)
    expected = torch.autograd.grad(streamed_mixing_distance(factors, q, k, scaling=0.4), factors.C_BTHN)[0]
    for factor in (factors.B_BTHN, factors.log_decay_BTH, factors.step_BTH, factors.skip_H):
        factor.requires_grad_(False)
    streamed_mixing_distance(factors, q, k, scaling=0.4).backward()
    assert torch.equal(factors.C_BTHN.grad, expected)
    assert factors.B_BTHN.grad is None


def test_the_teacher_gets_no_gradient():
    factors, q, k = random_pair(9)
    streamed_mixing_distance(factors, q.requires_grad_(), k.requires_grad_(), scaling=0.4).backward()
    assert q.grad is None
    assert k.grad is None


def test_what_does_not_belong_together_is_refused():
    factors, q, k = random_pair(9)
    with pytest.raises(ValueError, match="multiple of the key heads"):
        streamed_mixing_distance(factors, q[:, :3], k, scaling=0.4)
    with pytest.raises(ValueError, match="heads of the queries"):
        streamed_mixing_distance(factors, q[:, :2], k, scaling=0.4)
    with pytest.raises(ValueError, match="form is 'unsquared', 'squared', 'row_normalised', not 'cubed'"):
        streamed_mixing_distance(factors, q, k, scaling=0.4, form="cubed")
