"""The gated delta rule in chunks, in steps and as a matrix: against the recurrence in fp64, and transformers."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.qwen3_next.modeling_qwen3_next import (
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)

from distill.delta import delta_matrix, delta_rule, delta_rule_reference, delta_step

BATCH, HEADS, STATE, CHANNELS = 2, 3, 5, 4
TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}


def inputs(length: int) -> tuple[Tensor, ...]:
    """log α, β, k, q, v."""
    torch.manual_seed(0)
    options = {"dtype": torch.float64}
    return (
        -0.5 * torch.rand(BATCH, length, HEADS, **options),
        torch.rand(BATCH, length, HEADS, **options),
        F.normalize(torch.randn(BATCH, length, HEADS, STATE, **options), dim=-1),
        torch.randn(BATCH, length, HEADS, STATE, **options),
        torch.randn(BATCH, length, HEADS, CHANNELS, **options),
    )


def borders(length: int) -> Tensor:
    torch.manual_seed(1)
    resets = torch.rand(BATCH, length) < 0.06
    if length > 65:
        resets[0, 62:65] = True  # documents of one token, and a border where a chunk begins
    return resets


def outputs_and_gradients(function, arguments: tuple[Tensor, ...], initial: Tensor | None, resets: Tensor | None):
    leaves = [argument.clone().requires_grad_() for argument in arguments]
    state = None if initial is None else initial.clone().requires_grad_()
    y, final = function(*leaves, initial_state_BHPN=state, resets_BT=resets)
    torch.manual_seed(2)  # numbers of a shape: randn_like would follow strides
    loss = sum((tensor * torch.randn(tensor.shape, dtype=torch.float64)).sum() for tensor in (y, final))
    return y, final, *torch.autograd.grad(loss, leaves if state is None else [*leaves, state])


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("with_resets", [False, True])
def test_chunks_are_the_recurrence_with_its_gradients(length, with_state, with_resets):
    arguments = inputs(length)
    initial = torch.randn(BATCH, HEADS, CHANNELS, STATE, dtype=torch.float64) if with_state else None
    resets = borders(length) if with_resets else None
    expected = outputs_and_gradients(delta_rule_reference, arguments, initial, resets)
    for got, wanted in zip(outputs_and_gradients(delta_rule, arguments, initial, resets), expected, strict=True):
        torch.testing.assert_close(got, wanted, **TOLERANCE)


@pytest.mark.parametrize("chunk", [1, 7, 500])
def test_the_size_of_a_chunk_changes_nothing(chunk):
    arguments, resets = inputs(130), borders(130)
    expected = delta_rule_reference(*arguments, resets_BT=resets)
    for got, wanted in zip(delta_rule(*arguments, resets_BT=resets, chunk=chunk), expected, strict=True):
        torch.testing.assert_close(got, wanted, **TOLERANCE)


@pytest.mark.parametrize("with_resets", [False, True])
def test_the_matrix_times_the_values_is_the_recurrence(with_resets):
    *shaping, v = inputs(80)
    resets = borders(80) if with_resets else None
    matrix = delta_matrix(*shaping, resets_BT=resets)
    assert not matrix.triu(1).any()
    expected, _ = delta_rule_reference(*shaping, v, resets_BT=resets)
    torch.testing.assert_close(torch.einsum("bhts,bshp->bthp", matrix, v), expected, **TOLERANCE)


def test_steps_are_the_recurrence_and_overwrite_the_state():
    arguments = inputs(20)
    state = torch.randn(BATCH, HEADS, CHANNELS, STATE, dtype=torch.float64)
    expected, final = delta_rule_reference(*arguments, initial_state_BHPN=state)
    got = [delta_step(*(tensor[:, t] for tensor in arguments), state) for t in range(20)]
    torch.testing.assert_close(torch.stack(got, dim=1), expected, **TOLERANCE)
    torch.testing.assert_close(state, final, **TOLERANCE)


@pytest.mark.parametrize("theirs", [torch_chunk_gated_delta_rule, torch_recurrent_gated_delta_rule])
def test_it_is_transformers_gated_delta_rule(theirs):
    """Of Qwen3-Next, which rounds to fp32, scales queries by N^-½ and has the state the other way round."""
    log_decay, beta, k, q, v = inputs(150)
    initial = torch.randn(BATCH, HEADS, CHANNELS, STATE, dtype=torch.float64)
    expected, final = theirs(
        *(tensor.float() for tensor in (q, k, v)),
        g=log_decay.float(),
        beta=beta.float(),
        initial_state=initial.mT.float(),
        output_final_state=True,
    )
    y, state = delta_rule(log_decay, beta, k, STATE**-0.5 * q, v, initial_state_BHPN=initial)
    torch.testing.assert_close(y.float(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state.mT.float(), final, rtol=1e-4, atol=1e-5)


def test_a_key_of_length_one_lets_no_state_grow():
    """α = 1, β = 1 and nothing new: whatever keys come, the state's norm never rises."""
    zeros, _, k, q, v = (torch.zeros_like(tensor) if tensor.ndim == 3 else tensor for tensor in inputs(300))
    state = torch.randn(BATCH, HEADS, CHANNELS, STATE, dtype=torch.float64)
    before = state.square().sum()
    _, after = delta_rule(zeros, torch.ones_like(zeros), k, q, torch.zeros_like(v), initial_state_BHPN=state)
    assert after.square().sum() <= before


def test_sums_are_fp32_whatever_goes_in_and_under_autocast():
    arguments = [tensor.to(torch.bfloat16) for tensor in inputs(70)]
    y, state = delta_rule(*arguments)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(delta_rule(*arguments)[1], state)
