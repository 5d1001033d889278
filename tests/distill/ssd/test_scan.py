"""The chunked scan, the step and the matrix against the recurrence, in fp64, gradients included."""

import pytest
import torch
from torch import Tensor

from distill.ssd import mixing_matrix, scan, scan_reference, scan_step

BATCH, STATE, CHANNELS = 2, 5, 3
TOLERANCE = 1e-10


def inputs(length: int, groups: int, heads: int, seed: int = 0) -> tuple[Tensor, ...]:
    torch.manual_seed(seed)
    options = {"dtype": torch.float64}
    return (
        -3 * torch.rand(BATCH, length, heads, **options),
        torch.randn(BATCH, length, groups, STATE, **options),
        torch.randn(BATCH, length, groups, STATE, **options),
        torch.randn(BATCH, length, heads, CHANNELS, **options),
    )


def resets(length: int) -> Tensor:
    torch.manual_seed(1)
    borders = torch.rand(BATCH, length) < 0.06
    if length > 60:
        borders[0, 60:62] = True  # a document of one token, and a border near a chunk's
    return borders


def outputs_and_gradients(function, arguments: tuple[Tensor, ...], initial: Tensor | None, borders: Tensor | None):
    leaves = [argument.clone().requires_grad_() for argument in arguments]
    state = None if initial is None else initial.clone().requires_grad_()
    y, final = function(*leaves, initial_state_BHPN=state, resets_BT=borders)
    torch.manual_seed(2)
    # The same for every dtype; randn_like would follow strides.
    weights = (torch.randn(tensor.shape, dtype=torch.float64).to(tensor.dtype) for tensor in (y, final))
    loss = sum((tensor * weight).sum() for tensor, weight in zip((y, final), weights, strict=True))
    gradients = torch.autograd.grad(loss, leaves if state is None else [*leaves, state])
    return y, final, *gradients


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
@pytest.mark.parametrize(("groups", "heads"), [(1, 4), (2, 4), (4, 4)])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("with_resets", [False, True])
def test_chunked_scan_is_the_recurrence(length, groups, heads, with_state, with_resets):
    arguments = inputs(length, groups, heads)
    initial = torch.randn(BATCH, heads, CHANNELS, STATE, dtype=torch.float64) if with_state else None
    borders = resets(length) if with_resets else None
    expected = outputs_and_gradients(scan_reference, arguments, initial, borders)
    got = outputs_and_gradients(scan, arguments, initial, borders)
    for e, g in zip(expected, got, strict=True):
        torch.testing.assert_close(g, e, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("chunk", [1, 7, 64, 500])
def test_chunk_size_changes_nothing(chunk):
    arguments = inputs(130, 2, 4)
    expected, _ = scan_reference(*arguments)
    got, _ = scan(*arguments, chunk=chunk)
    torch.testing.assert_close(got, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("with_resets", [False, True])
def test_matrix_times_values_is_the_scan(with_resets):
    log_decay, B, C, x = inputs(90, 2, 4)
    borders = resets(90) if with_resets else None
    matrix = mixing_matrix(log_decay, B, C, resets_BT=borders)
    expected, _ = scan_reference(log_decay, B, C, x, resets_BT=borders)
    torch.testing.assert_close(torch.einsum("bhts,bshp->bthp", matrix, x), expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_matrix_entries_are_the_papers_product():
    """M_ts = C_t·B_s times the decays of s+1 … t, written as the product it stands for."""
    log_decay, B, C, _ = inputs(6, 1, 2)
    matrix = mixing_matrix(log_decay, B, C)
    for t in range(6):
        for s in range(6):
            product = log_decay[0, s + 1 : t + 1, 1].exp().prod() if s <= t else torch.tensor(0.0)
            expected = (C[0, t, 0] @ B[0, s, 0]) * product if s <= t else torch.tensor(0.0, dtype=torch.float64)
            torch.testing.assert_close(matrix[0, 1, t, s], expected)


def test_steps_are_the_scan_and_update_the_state_in_place():
    log_decay, B, C, x = inputs(20, 2, 4)
    expected, final = scan_reference(log_decay, B, C, x)
    state = torch.zeros(BATCH, 4, CHANNELS, STATE, dtype=torch.float64)
    address = state.data_ptr()
    got = [scan_step(log_decay[:, t], B[:, t], C[:, t], x[:, t], state) for t in range(20)]
    torch.testing.assert_close(torch.stack(got, dim=1), expected, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(state, final, rtol=TOLERANCE, atol=TOLERANCE)
    assert state.data_ptr() == address


def test_a_document_after_a_reset_knows_nothing_of_the_one_before():
    log_decay, B, C, x = inputs(100, 1, 2)
    borders = torch.zeros(BATCH, 100, dtype=torch.bool)
    borders[:, 70] = True
    together, _ = scan(log_decay, B, C, x, resets_BT=borders)
    alone, _ = scan(log_decay[:, 70:], B[:, 70:], C[:, 70:], x[:, 70:])
    torch.testing.assert_close(together[:, 70:], alone, rtol=TOLERANCE, atol=TOLERANCE)


def test_strong_decay_over_long_chunks_stays_finite_forward_and_backward():
    log_decay, B, C, x = (tensor.float() for tensor in inputs(128, 1, 2))
    log_decay = (log_decay * 200).requires_grad_()
    y, state = scan(log_decay, B, C, x)
    (y.sum() + state.sum()).backward()
    assert torch.isfinite(y).all()
    assert torch.isfinite(log_decay.grad).all()


def test_half_precision_inputs_are_summed_in_fp32_even_under_autocast():
    arguments = inputs(200, 2, 4)
    rounded = [argument.to(torch.bfloat16) for argument in arguments]
    expected, _ = scan_reference(*(argument.double() for argument in rounded))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, state = scan(*rounded)
    assert got.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=2**-8, atol=1e-6)  # the output's own rounding, no more
