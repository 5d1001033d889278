"""All parts of a loss in one forward, each kept whole or computed again."""

import pytest
import torch
from torch import Tensor

from distill.engines.joint import detached, joint, total
from distill.engines.plain import PlainEngine
from distill.objective import Part
from tests.distill.training.tiny_run import Alignment, Student, groups_of, micro_batch


def gradients(student: Student) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    return found


@pytest.mark.parametrize("recompute", [False, True])
def test_dropout_is_the_same_as_part_by_part(recompute):
    student = Student(dropout=0.5)
    objective = Alignment(student, noise=0)

    def parts():
        return objective.parts(micro_batch(0))

    torch.manual_seed(3)
    streamed = PlainEngine(student, groups_of(student)).backward(parts, 0.5, last=True)
    expected, after = gradients(student), torch.rand(())

    torch.manual_seed(3)
    losses = joint(parts, recompute=recompute)
    total(losses, 0.5).backward()
    assert detached(losses) == streamed
    assert not any(loss.requires_grad for loss in detached(losses).values())
    got = gradients(student)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], gradient) for name, gradient in expected.items())
    assert torch.rand(()) == after


@pytest.mark.parametrize(("recompute", "calls"), [(False, 1), (True, 2)])
def test_a_part_is_computed_again_in_backward_or_kept(recompute, calls):
    weight = torch.ones(2, requires_grad=True)
    called = []

    def loss_sum(name: str) -> Tensor:
        called.append(name)
        return weight.square().sum()

    losses = joint(lambda: iter([Part(n, lambda n=n: loss_sum(n)) for n in ("first", "second")]), recompute=recompute)
    assert called == ["first", "second"]
    total(losses, 2.0).backward()
    assert sorted(called) == sorted(["first", "second"] * calls)
    assert torch.equal(weight.grad, torch.full((2,), 8.0))
