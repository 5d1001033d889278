"""Who runs the scan, and that other libraries' kernels compute it.

On CPU the arguments' mapping is tested through the library's own naive versions, where it is installed; its kernels
themselves need CUDA.
"""

import importlib
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from distill import doctor
from distill.errors import UserError
from distill.ssd import backends, scan, scan_reference
from distill.ssd.kernels import FORGET, fla_scan
from tests.distill.ssd.test_scan import outputs_and_gradients

CPU, CUDA = torch.device("cpu"), torch.device("cuda")

needs_fla = pytest.mark.skipif(find_spec("fla") is None, reason="flash-linear-attention is not installed")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="kernels run on CUDA alone")


def inputs(length: int, groups: int, *, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Of the sizes that kernels take, with the decays of a converted layer; the log decay stays fp32."""
    torch.manual_seed(0)
    shapes = ((groups, 32), (groups, 32), (4, 64))
    decay = -0.5 * torch.rand(2, length, 4)
    return (decay.to(device), *(torch.randn(2, length, *shape).to(device, dtype) for shape in shapes))


def borders(length: int) -> Tensor:
    """Documents that begin inside chunks, at a chunk's border, and one token long."""
    resets = torch.zeros(2, length, dtype=torch.bool)
    resets[0, [0, 30, 31, 64]] = True
    resets[1, [5, length - 1]] = True
    return resets


def close(got: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> None:
    for g, e in zip(got, expected, strict=True):
        g, e = g.double().cpu(), e.double().cpu()
        assert (g - e).norm() <= tolerance * e.norm()


def by_reference(arguments: tuple[Tensor, ...], initial: Tensor | None, resets: Tensor | None) -> tuple[Tensor, ...]:
    exact = tuple(argument.double().cpu() for argument in arguments)
    return outputs_and_gradients(scan_reference, exact, None if initial is None else initial.double().cpu(), resets)


@needs_fla
@pytest.mark.parametrize("naive", ["naive_chunk_simple_gla", "naive_recurrent_simple_gla"])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("with_resets", [False, True])
def test_the_words_of_flash_linear_attention(naive, groups, with_state, with_resets):
    kernel = getattr(importlib.import_module("fla.ops.simple_gla.naive"), naive)
    arguments = inputs(130, groups, device=CPU, dtype=torch.float32)
    initial = torch.randn(2, 4, 64, 32) if with_state else None
    resets = borders(130) if with_resets else None

    def ours(*tensors, initial_state_BHPN, resets_BT):
        return fla_scan(*tensors, initial_state_BHPN, resets_BT, kernel)

    got = outputs_and_gradients(ours, arguments, initial, resets)
    close(got, by_reference(arguments, initial, resets), 1e-5)


def test_what_forgets_leaves_exactly_nothing():
    assert torch.tensor(FORGET).exp() == 0
    assert torch.exp2(torch.tensor(FORGET) * torch.log2(torch.tensor(torch.e))) == 0


@needs_fla
@needs_cuda
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 4e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("with_resets", [False, True])
def test_the_kernel_is_the_recurrence(dtype, tolerance, groups, with_state, with_resets):
    """TF32 has 10 bits of mantissa, bfloat16 has 7; gradients add a few roundings up."""
    if why := backends._import_problem(*backends._LIBRARIES["fla"]):
        pytest.skip(why)
    arguments = inputs(200, groups, device=CUDA, dtype=dtype)
    initial = torch.randn(2, 4, 64, 32) if with_state else None
    resets = borders(200) if with_resets else None

    def ours(*tensors, initial_state_BHPN, resets_BT):
        y, final = fla_scan(*tensors, initial_state_BHPN, resets_BT)
        return y.cpu(), final.cpu()

    on_gpu = (None if tensor is None else tensor.to(CUDA) for tensor in (initial, resets))
    close(outputs_and_gradients(ours, arguments, *on_gpu), by_reference(arguments, initial, resets), tolerance)


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_plain_torch_on_cuda_is_the_recurrence(monkeypatch, dtype):
    monkeypatch.setenv(backends.CHOICE, "torch")
    arguments = tuple(argument.to(dtype) for argument in inputs(200, 4, device=CUDA, dtype=dtype))
    got = outputs_and_gradients(
        lambda *tensors, **options: tuple(tensor.cpu() for tensor in scan(*tensors, **options)),
        arguments,
        None,
        borders(200).to(CUDA),
    )
    close(got, by_reference(arguments, None, borders(200)), 1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize(
    ("hopper", "from_3_4_0", "from_3_7_1", "tilelang", "refused"),
    [
        (True, True, False, False, True),
        (True, True, False, True, False),
        (True, True, True, False, False),
        (True, False, False, False, False),
        (False, True, False, False, False),
    ],
)
def test_gradients_that_fla_refuses_are_made_by_another(monkeypatch, hopper, from_3_4_0, from_3_7_1, tilelang, refused):
    """Seen on an H200 with Triton 3.6.0: the forward pass ran, and the first backward pass raised."""
    flags = {"IS_NVIDIA_HOPPER": hopper, "TRITON_ABOVE_3_4_0": from_3_4_0, "TRITON_ABOVE_3_7_1": from_3_7_1}
    monkeypatch.setitem(sys.modules, "fla.utils", SimpleNamespace(**flags))
    monkeypatch.setitem(sys.modules, "fla.ops.simple_gla", SimpleNamespace())
    monkeypatch.setattr(backends, "find_spec", lambda name: tilelang if name == "tilelang" else True)
    backends._import_problem.cache_clear()
    monkeypatch.delenv(backends.CHOICE, raising=False)
    assert (backends.backend(CUDA, torch.bfloat16) != "fla") == refused
    assert ("tilelang" in (backends.obstacle("fla", CUDA, torch.bfloat16) or "")) == refused
    backends._import_problem.cache_clear()


@pytest.fixture
def fla_imports(monkeypatch):
    """As on a machine where the library is installed and works."""
    monkeypatch.setattr(backends, "_import_problem", lambda module, package: None)


def test_on_cpu_it_is_torch_whatever_is_installed(monkeypatch, fla_imports):
    monkeypatch.delenv(backends.CHOICE, raising=False)
    assert backends.backend(CPU, torch.bfloat16) == "torch"


def test_on_cuda_it_is_the_kernel_where_that_loses_nothing(monkeypatch, fla_imports):
    monkeypatch.delenv(backends.CHOICE, raising=False)
    assert backends.backend(CUDA, torch.bfloat16) == "fla"
    assert backends.backend(CUDA, torch.float64) == "torch"
    assert backends.backend(CUDA, torch.float32) == "torch"
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert backends.backend(CUDA, torch.float32) == "fla"


def test_what_does_not_import_is_not_used(monkeypatch):
    monkeypatch.delenv(backends.CHOICE, raising=False)
    backends._import_problem.cache_clear()
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    assert backends.backend(CUDA, torch.bfloat16) == "torch"
    assert "pip install flash-linear-attention" in backends.obstacle("fla", CUDA, torch.bfloat16)
    backends._import_problem.cache_clear()


def test_a_choice_is_followed_or_refused(monkeypatch, fla_imports):
    monkeypatch.setenv(backends.CHOICE, "torch")
    assert backends.backend(CUDA, torch.bfloat16) == "torch"
    monkeypatch.setenv(backends.CHOICE, "fla")
    with pytest.raises(UserError, match=r"DISTILL_SCAN=fla: not here, it needs a CUDA device, not the cpu"):
        scan(*inputs(3, 1, device=CPU, dtype=torch.float32))
    monkeypatch.setenv(backends.CHOICE, "triton")
    with pytest.raises(UserError, match="one of fla, mamba_ssm, torch"):
        backends.backend(CPU, torch.float32)


@pytest.mark.parametrize("asked", [None, "torch", "fla"])
@pytest.mark.parametrize("gpu", [False, True])
def test_doctor_says_what_the_scan_does(monkeypatch, fla_imports, gpu, asked):
    if asked:
        monkeypatch.setenv(backends.CHOICE, asked)
    else:
        monkeypatch.delenv(backends.CHOICE, raising=False)
    told = doctor._scan_backends({"gpus": [{"bfloat16": True}] if gpu else []})
    used = [name for name, backend in told.items() if backend["used"]]
    if asked == "fla" and not gpu:
        assert used == []
        assert "it needs a CUDA device" in told["none"]["why"]
    else:
        assert used == [backends.backend(CUDA if gpu else CPU, torch.bfloat16)]
        assert all(backend["why"] for backend in told.values())
