"""The fitted projection is the ridge minimum, whichever way it is found, and its error is the one that it makes."""

import copy

import pytest
import torch
from torch import nn

from distill.fitting.outputs import OutputSums

N, INNER, D = 60, 12, 5


@pytest.fixture(params=[False, True], ids=["plain", "bias"])
def projection(request) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(INNER, D, bias=request.param, dtype=torch.float64).requires_grad_(False)


@pytest.fixture
def heads() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(N, INNER, dtype=torch.float64) * torch.linspace(0.1, 2, INNER) + 0.3


def sums(projection: nn.Linear, heads: torch.Tensor, target_ND: torch.Tensor) -> OutputSums:
    """Added in pieces of different sizes."""
    made = OutputSums(with_bias=projection.bias is not None)
    for first, last in ((0, 1), (1, 40), (40, N)):
        made.add(heads[first:last], target_ND[first:last])
    return made


def joint(projection: nn.Linear) -> torch.Tensor:
    """[W | b], (D, I) or (D, I + 1)."""
    parts = [projection.weight, *([] if projection.bias is None else [projection.bias[:, None]])]
    return torch.cat(parts, dim=1)


def relative_error(projection: nn.Linear, heads: torch.Tensor, target_ND: torch.Tensor) -> float:
    return float((projection(heads) - target_ND).square().sum() / target_ND.square().sum())


@pytest.mark.parametrize("ridge", [1e-6, 1e-2, 3.0])
def test_it_is_least_squares_of_the_stacked_system(projection, heads, ridge):
    target_ND = torch.randn(N, D, dtype=torch.float64)
    columns = [heads, *([] if projection.bias is None else [torch.ones(N, 1, dtype=torch.float64)])]
    design_NI = torch.cat(columns, dim=1)
    pull = (ridge * heads.square().sum(dim=0).mean()).sqrt()
    stacked = torch.cat([design_NI, pull * torch.eye(design_NI.shape[1], dtype=torch.float64)])
    wanted = torch.linalg.lstsq(stacked, torch.cat([target_ND, pull * joint(projection).mT])).solution.mT
    made = sums(projection, heads, target_ND)
    made.fit_(projection, ridge)
    torch.testing.assert_close(joint(projection), wanted, rtol=1e-9, atol=1e-10)


def test_the_error_is_the_one_that_is_made(projection, heads):
    target_ND = torch.randn(N, D, dtype=torch.float64)
    made = sums(projection, heads, target_ND)
    before = made.error(projection)
    assert before == pytest.approx(relative_error(projection, heads, target_ND), rel=1e-9)
    made.fit_(projection, 1e-3)
    assert made.error(projection) == pytest.approx(relative_error(projection, heads, target_ND), rel=1e-9)
    assert made.error(projection) < before


def test_what_the_heads_can_make_is_found(projection, heads):
    wanted = copy.deepcopy(projection)
    wanted.weight.copy_(torch.randn(D, INNER))
    made = sums(projection, heads, wanted(heads))
    made.fit_(projection, 1e-13)
    torch.testing.assert_close(joint(projection), joint(wanted), rtol=1e-6, atol=1e-8)
    assert made.error(projection) < 1e-12


def test_a_heads_scale_is_among_it(projection, heads):
    scale_I = torch.tensor([0.25, 4.0, 1.0]).double().repeat_interleave(INNER // 3)
    wanted = copy.deepcopy(projection)
    wanted.weight.mul_(scale_I)
    sums(projection, heads, wanted(heads)).fit_(projection, 1e-13)
    torch.testing.assert_close(projection.weight, wanted.weight, rtol=1e-6, atol=1e-8)


def test_a_strong_ridge_leaves_the_seeded_projection(projection, heads):
    before = joint(projection).clone()
    sums(projection, heads, torch.randn(N, D, dtype=torch.float64)).fit_(projection, 1e12)
    torch.testing.assert_close(joint(projection), before, rtol=1e-8, atol=1e-9)


def test_sums_of_half_precision_are_in_double(projection):
    """In bf16 256 + 1 is 256."""
    made = OutputSums(with_bias=False)
    ones = torch.ones(1000, 1, dtype=torch.bfloat16)
    made.add(ones, ones)
    assert float(made.heads_II) == 1000
