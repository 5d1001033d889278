"""Projections read out of a larger module, beside the heads written out one by one."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from distill.projections import split, whole

H, K, P, D = 4, 2, 3, 5


def numbered(rows: list[str]) -> nn.Linear:
    """A projection whose row says what it is: weight and bias are ``number(row)`` everywhere."""
    made = nn.Linear(D, len(rows))
    with torch.no_grad():
        made.weight.copy_(torch.tensor([[number(row)] * D for row in rows]))
        made.bias.copy_(torch.tensor([number(row) for row in rows]))
    return made


def number(row: str) -> float:
    """q13 → 13, k13 → 113, v13 → 213: head 1, channel 3."""
    return float("qkv".index(row[0]) * 100 + int(row[1:]))


def head(kind: str, index: int) -> list[str]:
    return [f"{kind}{index}{channel}" for channel in range(P)]


BLOCKS = [row for kind, heads in (("q", H), ("k", K), ("v", K)) for index in range(heads) for row in head(kind, index)]
GROUPS = [
    row
    for group in range(K)
    for kind, index in (("q", 2 * group), ("q", 2 * group + 1), ("k", group), ("v", group))
    for row in head(kind, index)
]


@pytest.mark.parametrize(("rows", "grouped"), [(BLOCKS, False), (GROUPS, True)], ids=["blocks", "groups"])
@pytest.mark.parametrize("transposed", [False, True])
def test_each_projection_finds_its_heads(rows, grouped, transposed):
    fused = numbered(rows)
    if transposed:
        conv = Conv1D(len(rows), D)
        conv.weight, conv.bias = nn.Parameter(fused.weight.t().contiguous()), fused.bias
        fused = conv
    u = torch.randn(2, 7, D)
    for kind, heads, projection in zip("qkv", (H, K, K), split(fused, H, K, P, grouped=grouped), strict=True):
        expected = torch.tensor([number(row) for index in range(heads) for row in head(kind, index)])
        assert torch.equal(projection.bias, expected)
        assert torch.equal(projection.weight, expected[:, None].expand(-1, D))
        assert torch.equal(projection(u), nn.functional.linear(u, projection.weight, projection.bias))


def test_weights_are_read_when_they_are_whole():
    """An engine may fill them in front of the module's forward and take them away behind it."""
    fused = numbered(GROUPS)
    kept = fused.weight.detach().clone()
    q, k, v = split(fused, H, K, P, grouped=True)
    o = whole(Conv1D(D, D))
    fused.weight.data.zero_()
    fused.register_forward_pre_hook(lambda module, _: setattr(module.weight, "data", kept))
    fused.register_forward_hook(lambda module, *_: setattr(module.weight, "data", torch.zeros_like(kept)))
    u = torch.ones(1, D)
    assert (k(u) >= 100 * D).all()
    assert (v(u) >= 200 * D).all()
    assert q(u)[0, 1] == D + 1
    assert (fused.weight == 0).all()
    assert o.weight.shape == (D, D)
