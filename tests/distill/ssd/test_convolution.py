"""The short convolution against ``nn.Conv1d``, across calls, and at document borders."""

import pytest
import torch
from torch.nn import functional as F

from distill.ssd import causal_convolution, convolution_step

BATCH, CHANNELS, TAPS = 2, 6, 4


@pytest.fixture
def weights():
    torch.manual_seed(0)
    return torch.randn(CHANNELS, TAPS, dtype=torch.float64), torch.randn(CHANNELS, dtype=torch.float64)


def by_conv1d(x, weight, bias):
    padded = F.pad(x.mT, (TAPS - 1, 0))
    return F.conv1d(padded, weight[:, None], bias, groups=CHANNELS).mT


@pytest.mark.parametrize("length", [1, 2, 3, 4, 50])
def test_is_the_causal_depthwise_convolution_with_its_gradients(weights, length):
    weight, bias = (tensor.requires_grad_() for tensor in weights)
    x = torch.randn(BATCH, length, CHANNELS, dtype=torch.float64, requires_grad=True)
    got, expected = causal_convolution(x, weight, bias), by_conv1d(x, weight, bias)
    torch.testing.assert_close(got, expected)
    upstream = torch.randn_like(got)
    for g, e in zip(
        torch.autograd.grad(got, (x, weight, bias), upstream),
        torch.autograd.grad(expected, (x, weight, bias), upstream),
        strict=True,
    ):
        torch.testing.assert_close(g, e)


def test_past_inputs_make_two_calls_one(weights):
    x = torch.randn(BATCH, 20, CHANNELS, dtype=torch.float64)
    whole = causal_convolution(x, *weights)
    second = causal_convolution(x[:, 11:], *weights, past_BTC=x[:, 11 - TAPS + 1 : 11])
    torch.testing.assert_close(second, whole[:, 11:])


def test_a_step_is_the_last_position(weights):
    x = torch.randn(BATCH, 9, CHANNELS, dtype=torch.float64)
    assert torch.equal(convolution_step(x[:, -TAPS:], *weights), causal_convolution(x, *weights)[:, -1:])


@pytest.mark.parametrize("border", [1, 2, 3, 9, 19])
def test_no_tap_reaches_behind_a_reset(weights, border):
    x = torch.randn(BATCH, 20, CHANNELS, dtype=torch.float64)
    resets = torch.zeros(BATCH, 20, dtype=torch.bool)
    resets[:, border] = True
    together = causal_convolution(x, *weights, resets_BT=resets)
    torch.testing.assert_close(together[:, border:], causal_convolution(x[:, border:], *weights))
    torch.testing.assert_close(together[:, :border], causal_convolution(x[:, :border], *weights))


def test_a_reset_at_the_first_position_forgets_the_past(weights):
    x, past = torch.randn(BATCH, 5, CHANNELS), torch.randn(BATCH, TAPS - 1, CHANNELS)
    weight, bias = (tensor.float() for tensor in weights)
    resets = torch.zeros(BATCH, 5, dtype=torch.bool)
    resets[:, 0] = True
    got = causal_convolution(x, weight, bias, past_BTC=past, resets_BT=resets)
    torch.testing.assert_close(got, causal_convolution(x, weight, bias))
