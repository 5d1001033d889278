"""The written-out backward pass: against finite differences, against autograd, and what it keeps."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from distill.ssd import scan, tiled
from distill.ssd.chunked import chunked_scan
from tests.distill.ssd.test_scan import TOLERANCE, inputs, outputs_and_gradients, resets


def by_autograd(*tensors: Tensor, initial_state_BHPN: Tensor | None, resets_BT: Tensor | None):
    return chunked_scan(*tensors, initial_state_BHPN, resets_BT, 8)


@pytest.mark.parametrize("with_resets", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
def test_the_readable_form_is_the_tiled_one(with_state, with_resets):
    arguments = inputs(200, 2, 4)
    initial = torch.randn(2, 4, 3, 5, dtype=torch.float64) if with_state else None
    borders = resets(200) if with_resets else None
    expected = outputs_and_gradients(by_autograd, arguments, initial, borders)
    for e, g in zip(expected, outputs_and_gradients(scan, arguments, initial, borders), strict=True):
        torch.testing.assert_close(g, e, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize(("blocks", "span"), [(1, 1), (1, 3), (6, 2), (40, 16)])
@pytest.mark.parametrize("groups", [2, 6])
def test_how_it_is_tiled_changes_nothing(monkeypatch, blocks, span, groups):
    """Tiles of one head and of several, of one sequence and of all, with the state handed from span to span."""
    arguments, borders = inputs(90, groups, 6), resets(90)
    initial = torch.randn(2, 6, 3, 5, dtype=torch.float64)

    def chunks_of_eight(*tensors, **options):
        return scan(*tensors, **options, chunk=8)

    expected = outputs_and_gradients(by_autograd, arguments, initial, borders)
    monkeypatch.setattr(tiled, "_BLOCKS_A_THREAD", blocks)
    monkeypatch.setattr(tiled, "_SPAN", span)
    for e, g in zip(expected, outputs_and_gradients(chunks_of_eight, arguments, initial, borders), strict=True):
        torch.testing.assert_close(g, e, rtol=TOLERANCE, atol=TOLERANCE)


def test_finite_differences():
    leaves = [tensor[:1].requires_grad_() for tensor in inputs(11, 1, 2)]
    initial = torch.randn(1, 2, 3, 5, dtype=torch.float64, requires_grad=True)
    borders = torch.zeros(1, 11, dtype=torch.bool)
    borders[:, 6] = True
    for resets_BT in (None, borders):
        torch.autograd.gradcheck(
            lambda *tensors, resets_BT=resets_BT: scan(
                *tensors[:4], initial_state_BHPN=tensors[4], resets_BT=resets_BT, chunk=4
            ),
            (*leaves, initial),
        )


def test_nothing_flows_through_a_reset_not_even_rounding():
    log_decay, B, C, x = (tensor.float().requires_grad_() for tensor in inputs(100, 1, 2))
    borders = torch.zeros(2, 100, dtype=torch.bool)
    borders[:, 70] = True
    y, _ = scan(log_decay, B, C, x, resets_BT=borders)
    y[:, 70:].sum().backward(retain_graph=True)
    for leaf in (B, C, x):
        assert (leaf.grad[:, :70] == 0).all()
    log_decay.grad = None
    y.sum().backward()
    assert (log_decay.grad[:, 70] == 0).all()


def test_gradients_of_half_precision_under_autocast():
    """Autocast holds during backward as well where the caller's context does: sums stay fp32."""
    rounded = [tensor.bfloat16() for tensor in inputs(200, 2, 4)]
    expected = outputs_and_gradients(scan, tuple(tensor.double() for tensor in rounded), None, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        leaves = [tensor.requires_grad_() for tensor in rounded]
        y, final = scan(*leaves)
        torch.manual_seed(2)
        weights = [torch.randn(tensor.shape, dtype=torch.float64) for tensor in (y, final)]
        loss = (y.double() * weights[0].bfloat16().double()).sum() + (final.double() * weights[1]).sum()
        gradients = torch.autograd.grad(loss, leaves)
    for e, g in zip(expected[2:], gradients, strict=True):
        assert g.dtype == torch.bfloat16
        assert (g.double() - e).norm() < 2**-7 * e.norm()


def test_a_gradient_without_memory_of_its_own_is_read_right():
    """``sum`` hands back one number spread over a shape by strides of zero."""
    leaves = [tensor.requires_grad_() for tensor in inputs(70, 2, 2)]
    expected = torch.autograd.grad(by_autograd(*leaves, initial_state_BHPN=None, resets_BT=None)[0].sum(), leaves)
    for e, g in zip(expected, torch.autograd.grad(scan(*leaves)[0].sum(), leaves), strict=True):
        torch.testing.assert_close(g, e, rtol=TOLERANCE, atol=TOLERANCE)


def test_only_arguments_and_states_are_kept():
    """In the dtype they came in, and on fake tensors too, with which `distill plan` counts."""
    kept = []
    with FakeTensorMode():
        leaves = [
            torch.empty(2, 1024, 4, *rest, dtype=torch.bfloat16, requires_grad=True)
            for rest in ((), (32,), (32,), (64,))
        ]
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda t: t):
            scan(*leaves)
    states = 2 * 4 * (1024 // 64) * 64 * 32 * 4
    assert sum(tensor.nbytes for tensor in kept) == sum(leaf.nbytes for leaf in leaves) + states


def test_a_second_derivative_is_refused():
    leaves = [tensor.requires_grad_() for tensor in inputs(5, 1, 1)]
    (gradient,) = torch.autograd.grad(scan(*leaves)[0].square().sum(), leaves[3], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
