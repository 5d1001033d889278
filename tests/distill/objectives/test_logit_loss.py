"""logit_loss beside a version written with loops, and the properties a recipe relies on."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from distill.errors import UserError
from distill.objectives import DIVERGENCES, logit_loss, logits, scored_positions


def softmax(scores: list[float]) -> list[float]:
    top = max(scores)
    weights = [math.exp(score - top) for score in scores]
    return [weight / sum(weights) for weight in weights]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))


def naive(student, teacher, labels, divergence, temperature, ce_weight) -> float:
    total, count = 0.0, 0
    B, T, _ = student.shape
    for b, t in itertools.product(range(B), range(T)):
        if labels is not None and (t == T - 1 or labels[b, t + 1] == -100):
            continue
        p = softmax([score / temperature for score in teacher[b, t].tolist()])
        q = softmax([score / temperature for score in student[b, t].tolist()])
        m = [(a + c) / 2 for a, c in zip(p, q, strict=True)]
        between = {"forward_kl": kl(p, q), "reverse_kl": kl(q, p), "jsd": kl(p, m) / 2 + kl(q, m) / 2}[divergence]
        loss = (1 - ce_weight) * temperature**2 * between
        if ce_weight:
            loss -= ce_weight * math.log(softmax(student[b, t].tolist())[labels[b, t + 1]])
        total, count = total + loss, count + 1
    return total / count


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student = 2 * torch.randn(2, 6, 9, generator=generator, dtype=torch.float64)
    teacher = 2 * torch.randn(2, 6, 9, generator=generator, dtype=torch.float64)
    labels = torch.randint(9, (2, 6), generator=generator)
    labels[0, [0, 3]] = -100
    labels[1, [0, 4, 5]] = -100
    return student, teacher, labels


SETTINGS = list(itertools.product(DIVERGENCES, [0.5, 1.0, 3.0], [0.0, 0.3, 1.0]))


@pytest.mark.parametrize(("divergence", "temperature", "ce_weight"), SETTINGS)
def test_it_equals_the_loops(batch, divergence, temperature, ce_weight):
    settings = {"divergence": divergence, "temperature": temperature, "ce_weight": ce_weight}
    assert logit_loss(*batch, **settings).item() == pytest.approx(naive(*batch, **settings), rel=1e-12)
    if not ce_weight:
        student, teacher, _ = batch
        expected = naive(student, teacher, None, **settings)
        assert logit_loss(student, teacher, **settings).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("divergence", "temperature", "ce_weight"), SETTINGS)
def test_the_gradient_is_that_of_the_value(batch, divergence, temperature, ce_weight):
    student, teacher, labels = batch

    def loss(student: Tensor) -> Tensor:
        settings = {"divergence": divergence, "temperature": temperature, "ce_weight": ce_weight}
        return logit_loss(student, teacher, labels, **settings)

    assert torch.autograd.gradcheck(loss, student.requires_grad_())


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("rows", [1, 5, 7])
def test_chunks_change_nothing(batch, divergence, rows, monkeypatch):
    student = batch[0].requires_grad_()
    whole = logit_loss(*batch, divergence=divergence, ce_weight=0.2)
    (expected,) = torch.autograd.grad(whole, student)
    monkeypatch.setattr(logits, "CHUNK_ELEMENTS", rows * 9)
    chunked = logit_loss(*batch, divergence=divergence, ce_weight=0.2)
    (got,) = torch.autograd.grad(chunked, student)
    torch.testing.assert_close(chunked, whole)
    torch.testing.assert_close(got, expected)


def test_no_chunk_holds_more_rows_than_it_may(monkeypatch):
    """Every fp32 tensor made on the way has at most a chunk's elements, in forward and in backward."""
    student = torch.randn(4, 32, 50).bfloat16().requires_grad_()
    teacher = torch.randn(4, 32, 50).bfloat16()
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
        logit_loss(student, teacher).backward()
    assert 0 < largest <= 8 * 50


def test_sum_is_mean_times_scored_positions(batch):
    total = logit_loss(*batch, reduction="sum")
    torch.testing.assert_close(total, logit_loss(*batch) * scored_positions(batch[2]).sum())
    assert scored_positions(batch[2]).tolist() == [[True, True, False, True, True, False], [True] * 3 + [False] * 3]


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equal_logits_have_divergence_and_gradient_zero(batch, divergence):
    student = batch[0].float().requires_grad_()
    loss = logit_loss(student, student.detach().clone(), divergence=divergence, temperature=2.0)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert student.grad.abs().max() < 1e-7


def test_the_temperature_is_on_both_sides_and_its_square_in_front(batch):
    student, teacher, labels = batch
    hot = logit_loss(student, teacher, labels, temperature=4.0)
    torch.testing.assert_close(hot, 16 * logit_loss(student / 4, teacher / 4, labels))


def test_the_gradient_keeps_its_size_as_the_temperature_grows(batch):
    """Hinton 2015, section 2.1: at high temperature τ²·KL tends to a squared difference of centred logits."""
    student, teacher, _ = batch
    student.requires_grad_()
    (got,) = torch.autograd.grad(logit_loss(student, teacher, temperature=1e3, reduction="sum"), student)
    difference = student - teacher
    expected = (difference - difference.mean(-1, keepdim=True)) / student.shape[-1]
    torch.testing.assert_close(got, expected.detach(), rtol=2e-2, atol=2e-3)


def test_jsd_is_symmetric_and_bounded(batch):
    student, teacher, labels = batch
    torch.testing.assert_close(
        logit_loss(student, teacher, labels, divergence="jsd"), logit_loss(teacher, student, labels, divergence="jsd")
    )
    far = logit_loss(1e3 * student, 1e3 * teacher, labels, divergence="jsd")
    assert 0 < far <= math.log(2)


def test_reverse_kl_is_forward_kl_of_the_other(batch):
    student, teacher, labels = batch
    reverse = logit_loss(student, teacher, labels, divergence="reverse_kl")
    torch.testing.assert_close(reverse, logit_loss(teacher, student, labels, divergence="forward_kl"))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_extreme_logits_stay_finite(batch, divergence, scale):
    student, teacher, labels = (x * scale if x.is_floating_point() else x for x in batch)
    student = student.float().requires_grad_()
    loss = logit_loss(student, teacher.float(), labels, divergence=divergence, ce_weight=0.5)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("junk", [1e30, math.nan, math.inf])
def test_what_stands_at_unscored_positions_does_not_matter(batch, junk):
    student, teacher, labels = batch
    clean = logit_loss(*batch, ce_weight=0.5)
    unscored = ~scored_positions(labels)
    student[unscored] = junk
    teacher[unscored] = junk
    student.requires_grad_()
    loss = logit_loss(student, teacher, labels, ce_weight=0.5)
    loss.backward()
    assert torch.equal(loss, clean)
    assert (student.grad[unscored] == 0).all()
    assert student.grad.isfinite().all()


def test_the_first_label_of_a_document_is_never_predicted(batch):
    """Position 2 of sequence 0 stands before a document start (label -100 at 3), so nothing there counts."""
    student, teacher, labels = batch
    before = logit_loss(*batch)
    student[0, 2] += 5
    assert torch.equal(logit_loss(*batch), before)
    student[0, 3] += torch.arange(9)
    assert not torch.equal(logit_loss(student, teacher, labels), before)


def test_a_longer_batch_of_the_same_has_the_same_mean(batch):
    longer = [x.repeat(3, 4, *[1] * (x.ndim - 2)) for x in batch]
    torch.testing.assert_close(logit_loss(*longer, ce_weight=0.3), logit_loss(*batch, ce_weight=0.3))


def test_bf16_logits_give_an_fp32_loss(batch):
    student, teacher = batch[0].bfloat16().requires_grad_(), batch[1].bfloat16()
    loss = logit_loss(student, teacher, batch[2], temperature=2.0)
    loss.backward()
    assert (loss.dtype, student.grad.dtype) == (torch.float32, torch.bfloat16)
    exact = logit_loss(student.double(), teacher.double(), batch[2], temperature=2.0)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)


def test_the_teacher_gets_no_gradient_and_no_generator_is_touched(batch):
    student, teacher, labels = batch
    state = torch.get_rng_state()
    logit_loss(student.requires_grad_(), teacher.requires_grad_(), labels).backward()
    assert teacher.grad is None
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_scored_gives_zero(batch):
    student, teacher, labels = batch
    assert logit_loss(student, teacher, torch.full_like(labels, -100), ce_weight=0.5).item() == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"divergence": "kl"}, "'kl' is unknown; allowed: forward_kl, reverse_kl, jsd"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"ce_weight": 1.5}, "between 0 and 1"),
        ({"ce_weight": 0.5, "labels_BT": None}, "needs labels"),
    ],
)
def test_wrong_settings_are_named(batch, settings, message):
    student, teacher, labels = batch
    with pytest.raises(UserError, match=message):
        logit_loss(student, teacher, **{"labels_BT": labels} | settings)


def test_vocabularies_of_different_size_are_refused(batch):
    student, teacher, labels = batch
    with pytest.raises(ValueError, match=r"\(2, 6, 9\) and \(2, 6, 8\)"):
        logit_loss(student, teacher[..., :8], labels)
