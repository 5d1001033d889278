"""hidden_distance beside a version written with loops, and the properties a recipe relies on."""

import math

import pytest
import torch
from torch import Tensor

from distill.objectives import head_distance, hidden_distance


def naive(student: Tensor, teacher: Tensor, valid: Tensor) -> float:
    total, count = 0.0, 0
    for b in range(student.shape[0]):
        for t in range(student.shape[1]):
            if valid[b, t]:
                total += math.sqrt(sum(float(s - h) ** 2 for s, h in zip(student[b, t], teacher[b, t], strict=True)))
                count += 1
    return total / count


@pytest.fixture
def states() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
    teacher = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
    valid = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
    return student, teacher, valid


def test_it_equals_the_loops(states):
    student, teacher, valid = states
    assert hidden_distance(student, teacher, valid).item() == pytest.approx(naive(student, teacher, valid), rel=1e-14)
    everywhere = torch.ones_like(valid)
    assert hidden_distance(student, teacher).item() == pytest.approx(naive(student, teacher, everywhere), rel=1e-14)


def test_the_gradient_is_that_of_the_value(states):
    student, teacher, valid = states
    assert torch.autograd.gradcheck(lambda s: hidden_distance(s, teacher, valid), student.requires_grad_())


def test_sum_is_mean_times_valid_tokens(states):
    student, teacher, valid = states
    total = hidden_distance(student, teacher, valid, reduction="sum")
    torch.testing.assert_close(total, hidden_distance(student, teacher, valid) * valid.sum())


def test_equal_states_have_distance_and_gradient_zero(states):
    student = states[0].float().requires_grad_()
    loss = hidden_distance(student, student.detach().clone())
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(student.grad, torch.zeros_like(student))


def test_one_equal_token_does_not_spoil_the_gradient_of_the_others(states):
    student, teacher, valid = states
    teacher[0, 0] = student[0, 0]
    student.requires_grad_()
    hidden_distance(student, teacher, valid).backward()
    assert student.grad.isfinite().all()
    assert (student.grad[0, 0] == 0).all()
    assert (student.grad[0, 1] != 0).all()


@pytest.mark.parametrize("junk", [1e30, math.nan, math.inf])
def test_padding_content_does_not_matter(states, junk):
    student, teacher, valid = states
    clean = hidden_distance(student, teacher, valid)
    student[~valid] = junk
    teacher[~valid] = -junk
    student.requires_grad_()
    loss = hidden_distance(student, teacher, valid)
    loss.backward()
    assert torch.equal(loss, clean)
    assert (student.grad[~valid] == 0).all()
    assert student.grad.isfinite().all()


def test_a_longer_batch_of_the_same_has_the_same_mean(states):
    student, teacher, valid = states
    longer = [x.repeat(3, 4, *[1] * (x.ndim - 2)) for x in states]
    torch.testing.assert_close(hidden_distance(*longer), hidden_distance(student, teacher, valid))


def test_the_norm_is_not_squared(states):
    student, teacher, valid = states
    double = hidden_distance(student, student + 2 * (teacher - student), valid)
    torch.testing.assert_close(double, 2 * hidden_distance(student, teacher, valid))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_loss_is_in_fp32_and_the_gradient_in_the_inputs_dtype(states, dtype):
    student, teacher = states[0].to(dtype).requires_grad_(), states[1].to(dtype)
    loss = hidden_distance(student, teacher)
    loss.backward()
    assert (loss.dtype, student.grad.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(loss.double(), hidden_distance(student.double(), teacher.double()), rtol=1e-6, atol=0)


def test_the_teacher_gets_no_gradient(states):
    student, teacher, _ = states
    hidden_distance(student.requires_grad_(), teacher.requires_grad_()).backward()
    assert teacher.grad is None


def test_nothing_valid_gives_zero(states):
    student, teacher, valid = states
    assert hidden_distance(student, teacher, torch.zeros_like(valid)).item() == 0


def test_broadcasting_and_unknown_reductions_are_refused(states):
    student, teacher, _ = states
    with pytest.raises(ValueError, match=r"\(2, 5, 7\) and \(1, 5, 7\)"):
        hidden_distance(student, teacher[:1])
    with pytest.raises(ValueError, match="'batchmean'"):
        hidden_distance(student, teacher, reduction="batchmean")


def test_heads_by_loops_and_their_gradient(states):
    student, teacher, valid = states
    rows = [(b, t) for b in range(2) for t in range(5) if valid[b, t]]
    errors = [sum(float(s - h) ** 2 for s, h in zip(student[at], teacher[at], strict=True)) / 7 for at in rows]
    assert head_distance(student, teacher, valid).item() == pytest.approx(sum(errors) / len(rows), rel=1e-14)
    total = head_distance(student, teacher, valid, reduction="sum")
    assert total.item() == pytest.approx(sum(errors), rel=1e-14)
    assert head_distance(student, teacher).item() == pytest.approx(
        torch.nn.functional.mse_loss(student, teacher).item(), rel=1e-14
    )
    assert torch.autograd.gradcheck(lambda s: head_distance(s, teacher, valid), student.requires_grad_())


def test_heads_in_16_bits_are_compared_in_32(states):
    student, teacher, valid = (x.bfloat16() if x.is_floating_point() else x for x in states)
    distance = head_distance(student, teacher, valid)
    assert distance.dtype == torch.float32
    assert distance == head_distance(student.float(), teacher.float(), valid)
    with pytest.raises(ValueError, match="same shape"):
        head_distance(student, teacher[:1])
