"""topk_loss beside a version written with loops and beside the loss over the whole vocabulary."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from distill.errors import UserError
from distill.objectives import DIVERGENCES, logit_loss, logits, scored_positions
from distill.objectives.topk import TopK, top_k_and_tail, topk_loss

V = 9
SETTINGS = list(itertools.product(DIVERGENCES, [0.0, 0.3, 1.0]))


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student = 2 * torch.randn(2, 6, V, generator=generator, dtype=torch.float64)
    teacher = 2 * torch.randn(2, 6, V, generator=generator, dtype=torch.float64)
    labels = torch.randint(V, (2, 6), generator=generator)
    labels[0, [0, 3]] = -100
    labels[1, [0, 4, 5]] = -100
    return student, teacher, labels


def softmax(scores: list[float]) -> list[float]:
    top = max(scores)
    weights = [math.exp(score - top) for score in scores]
    return [weight / sum(weights) for weight in weights]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))


def naive(student, teacher, labels, k, divergence, ce_weight) -> float:
    total, count = 0.0, 0
    for b, t in itertools.product(range(2), range(5)):
        if labels[b, t + 1] == -100:
            continue
        p, q = softmax(teacher[b, t].tolist()), softmax(student[b, t].tolist())
        kept = sorted(range(V), key=p.__getitem__, reverse=True)[:k]
        others = [v for v in range(V) if v not in kept]
        p, q_k = ([x[v] for v in kept] + [sum(x[v] for v in others)] for x in (p, q))
        m = [(a + c) / 2 for a, c in zip(p, q_k, strict=True)]
        between = {"forward_kl": kl(p, q_k), "reverse_kl": kl(q_k, p), "jsd": kl(p, m) / 2 + kl(q_k, m) / 2}[divergence]
        total += (1 - ce_weight) * between - ce_weight * math.log(q[labels[b, t + 1]])
        count += 1
    return total / count


@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize(("divergence", "ce_weight"), SETTINGS)
def test_it_equals_the_loops(batch, k, divergence, ce_weight):
    student, teacher, labels = batch
    loss = topk_loss(student, *top_k_and_tail(teacher, k), labels, divergence=divergence, ce_weight=ce_weight)
    assert loss.item() == pytest.approx(naive(*batch, k, divergence, ce_weight), rel=1e-12)


@pytest.mark.parametrize("k", [V, V + 5])
@pytest.mark.parametrize(("divergence", "ce_weight"), SETTINGS)
def test_with_the_whole_vocabulary_it_is_the_full_loss(batch, k, divergence, ce_weight):
    student, teacher, labels = batch
    student.requires_grad_()
    settings = {"divergence": divergence, "ce_weight": ce_weight}
    full = logit_loss(student, teacher, labels, **settings)
    cut = topk_loss(student, *top_k_and_tail(teacher, k), labels, **settings)
    torch.testing.assert_close(cut, full, rtol=1e-12, atol=0)
    wanted, got = (torch.autograd.grad(loss, student)[0] for loss in (full, cut))
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize(("divergence", "ce_weight"), SETTINGS)
def test_the_gradient_is_that_of_the_value(batch, divergence, ce_weight):
    student, teacher, labels = batch
    top = top_k_and_tail(teacher, 3)
    assert torch.autograd.gradcheck(
        lambda z: topk_loss(z, *top, labels, divergence=divergence, ce_weight=ce_weight), student.requires_grad_()
    )


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_token_more_brings_it_closer_to_the_full_loss_from_below(batch, divergence):
    student, teacher, labels = batch
    losses = [topk_loss(student, *top_k_and_tail(teacher, k), labels, divergence=divergence) for k in range(1, V + 1)]
    assert all(a < b for a, b in itertools.pairwise(losses[:-1]))
    # With one token in the tail nothing is lumped together any more.
    torch.testing.assert_close(losses[-2], losses[-1])


def test_a_student_that_shares_the_tail_as_its_teacher_does_has_the_full_loss(batch):
    _, teacher, labels = batch
    ids = top_k_and_tail(teacher, 3).ids_BTK
    student = teacher.scatter_add(-1, ids, torch.randn(2, 6, 3, dtype=torch.float64))
    torch.testing.assert_close(
        topk_loss(student, *top_k_and_tail(teacher, 3), labels), logit_loss(student, teacher, labels)
    )


def test_its_minimum_gives_every_kept_token_the_teachers_probability(batch):
    """Whatever the shape of its tail. Plain top-k distillation, without the tail, would still push the kept ones up."""
    _, teacher, labels = batch
    top = top_k_and_tail(teacher, 3)
    shape = torch.randn(2, 6, V, dtype=torch.float64).scatter(-1, top.ids_BTK, -torch.inf).log_softmax(-1)
    student = (top.log_tail_BT[..., None] + shape).scatter(-1, top.ids_BTK, top.log_probs_BTK).requires_grad_()
    loss = topk_loss(student, *top, labels)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() == pytest.approx(0, abs=1e-14)
    assert gradient.abs().max() < 1e-14
    alone = TopK(top.ids_BTK, top.log_probs_BTK.log_softmax(-1), torch.full_like(top.log_tail_BT, -math.inf))
    (gradient,) = torch.autograd.grad(topk_loss(student, *alone, labels), student)
    kept = gradient.gather(-1, top.ids_BTK)
    assert (kept[scored_positions(labels)] < -1e-6).all()


@pytest.mark.parametrize("rows", [1, 5, 7])
def test_chunks_change_nothing(batch, rows, monkeypatch):
    student, teacher, labels = batch
    student.requires_grad_()
    top = top_k_and_tail(teacher, 3)
    whole = topk_loss(student, *top, labels, ce_weight=0.2)
    (expected,) = torch.autograd.grad(whole, student)
    monkeypatch.setattr(logits, "CHUNK_ELEMENTS", rows * V)
    for one, other in zip(top_k_and_tail(teacher, 3), top, strict=True):
        assert torch.equal(one, other)
    chunked = topk_loss(student, *top, labels, ce_weight=0.2)
    (got,) = torch.autograd.grad(chunked, student)
    torch.testing.assert_close(chunked, whole)
    torch.testing.assert_close(got, expected)


def test_no_chunk_holds_more_rows_than_it_may(monkeypatch):
    """Every fp32 tensor made on the way has at most a chunk's elements, in forward and in backward."""
    student = torch.randn(4, 32, 50).bfloat16().requires_grad_()
    teacher = torch.randn(4, 32, 50).bfloat16()
    labels = torch.zeros(4, 32, dtype=torch.long)
    monkeypatch.setattr(logits, "CHUNK_ELEMENTS", 8 * 50)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            made = func(*args, **(kwargs or {}))
            for tensor in made if isinstance(made, list | tuple) else [made]:
                if isinstance(tensor, Tensor) and tensor.dtype == torch.float32:
                    largest = max(largest, tensor.numel())
            return made

    with Watch():
        topk_loss(student, *top_k_and_tail(teacher, 2), labels).backward()
    assert 0 < largest <= 8 * 50


def test_sum_is_mean_times_scored_positions(batch):
    student, teacher, labels = batch
    top = top_k_and_tail(teacher, 3)
    total = topk_loss(student, *top, labels, reduction="sum")
    torch.testing.assert_close(total, topk_loss(student, *top, labels) * scored_positions(labels).sum())


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equal_logits_have_divergence_and_gradient_zero(batch, divergence):
    student = batch[0].float().requires_grad_()
    top = top_k_and_tail(student, 4)
    loss = topk_loss(student, *top, batch[2], divergence=divergence)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert student.grad.abs().max() < 1e-7


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("k", [1, 3, V])
@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_extreme_logits_stay_finite(batch, divergence, k, scale):
    student, teacher, labels = (x * scale if x.is_floating_point() else x for x in batch)
    student = student.float().requires_grad_()
    loss = topk_loss(student, *top_k_and_tail(teacher.float(), k), labels, divergence=divergence, ce_weight=0.5)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_a_tail_too_small_for_one_minus_the_rest_is_still_exact():
    """In fp32, 1 − Σ of the kept probabilities would be 0 on both sides."""
    student = torch.tensor([[[30.0, 29.0, 0.0, 1.0], [0.0] * 4]]).requires_grad_()
    teacher = torch.tensor([[[29.0, 30.0, 2.0, 1.0], [0.0] * 4]])
    top = top_k_and_tail(teacher, 2)
    exact = teacher.double().log_softmax(-1)[0, 0, 2:].logsumexp(-1)
    assert top.log_tail_BT[0, 0].item() == pytest.approx(exact.item(), rel=1e-6)
    loss = topk_loss(student, *top, torch.zeros(1, 2, dtype=torch.long), divergence="reverse_kl")
    twice = student.detach().double().requires_grad_()
    expected = topk_loss(
        twice, *top_k_and_tail(teacher.double(), 2), torch.zeros(1, 2, dtype=torch.long), divergence="reverse_kl"
    )
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    got, wanted = (torch.autograd.grad(value, leaf)[0] for value, leaf in ((loss, student), (expected, twice)))
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-14)
    assert wanted[0, 0, 2:].abs().min() > 0


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_a_teacher_without_a_tail_wants_none(batch, divergence):
    """k below V, but nothing left outside: what fp16 makes of a tail below e⁻⁶⁵⁵⁰⁴."""
    student, teacher, labels = batch
    top = top_k_and_tail(teacher, 3)
    alone = TopK(top.ids_BTK, top.log_probs_BTK.log_softmax(-1), torch.full_like(top.log_tail_BT, -math.inf))
    student.requires_grad_()
    loss = topk_loss(student, *alone, labels, divergence=divergence)
    loss.backward()
    assert loss.isfinite()
    kept = torch.zeros_like(student).scatter(-1, top.ids_BTK, 1).bool()
    assert (student.grad[scored_positions(labels)] >= 0)[~kept[scored_positions(labels)]].all()


@pytest.mark.parametrize("junk", [1e30, math.nan, math.inf])
def test_what_stands_at_unscored_positions_does_not_matter(batch, junk):
    student, teacher, labels = batch
    ids, log_probs, log_tail = top_k_and_tail(teacher, 3)
    clean = topk_loss(student, ids, log_probs, log_tail, labels, ce_weight=0.5)
    unscored = ~scored_positions(labels)
    for values in (student, log_probs, log_tail):
        values[unscored] = junk
    ids[unscored] = 10**6
    student.requires_grad_()
    loss = topk_loss(student, ids, log_probs, log_tail, labels, ce_weight=0.5)
    loss.backward()
    assert torch.equal(loss, clean)
    assert (student.grad[unscored] == 0).all()
    assert student.grad.isfinite().all()


def test_bf16_logits_give_an_fp32_loss(batch):
    student, teacher = batch[0].bfloat16().requires_grad_(), batch[1].bfloat16()
    top = top_k_and_tail(teacher, 3)
    assert top.log_probs_BTK.dtype == top.log_tail_BT.dtype == torch.float32
    loss = topk_loss(student, *top, batch[2])
    loss.backward()
    assert (loss.dtype, student.grad.dtype) == (torch.float32, torch.bfloat16)
    exact = topk_loss(student.double(), *top_k_and_tail(teacher.double(), 3), batch[2])
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)


def test_the_teacher_gets_no_gradient_and_no_generator_is_touched(batch):
    student, teacher, labels = batch
    state = torch.get_rng_state()
    ids, log_probs, log_tail = top_k_and_tail(teacher.requires_grad_(), 3)
    topk_loss(student.requires_grad_(), ids, log_probs.requires_grad_(), log_tail.requires_grad_(), labels).backward()
    assert log_probs.grad is None
    assert teacher.grad is None
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_scored_gives_zero(batch):
    student, teacher, labels = batch
    nothing = torch.full_like(labels, -100)
    assert topk_loss(student, *top_k_and_tail(teacher, 3), nothing, ce_weight=0.5).item() == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"divergence": "kl"}, "'kl' is unknown; allowed: forward_kl, reverse_kl, jsd"),
        ({"ce_weight": 1.5}, "between 0 and 1"),
    ],
)
def test_wrong_settings_are_named(batch, settings, message):
    student, teacher, labels = batch
    with pytest.raises(UserError, match=message):
        topk_loss(student, *top_k_and_tail(teacher, 3), labels, **settings)


def test_predictions_for_other_positions_are_refused(batch):
    student, teacher, labels = batch
    with pytest.raises(ValueError, match=r"must agree, not \(2, 6, 9\), \(2, 5, 3\)"):
        topk_loss(student, *top_k_and_tail(teacher[:, :5], 3), labels)
