"""That mamba-ssm's kernel computes the scan of `mamba2`, and when it is asked.

On CPU the arguments' mapping is tested through a stand-in of the kernel's signature that takes it at its word, a
position at a time; the kernel itself needs CUDA.
"""

import sys
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache

from distill import doctor
from distill.cache import adopt
from distill.errors import UserError
from distill.mixers import KINDS, MIXERS
from distill.ssd import backends, scan_reference
from distill.ssd.kernels import MAMBA_SSM_CHUNK, mamba_ssm_scan
from tests.distill.ssd.test_kernels import CPU, CUDA, borders, close
from tests.distill.ssd.test_scan import outputs_and_gradients

MODULE = "mamba_ssm.ops.triton.ssd_combined"

needs_kernel = pytest.mark.skipif(
    not torch.cuda.is_available() or find_spec("mamba_ssm") is None, reason="needs CUDA and mamba-ssm"
)


def mamba_chunk_scan_combined(
    x,
    dt,
    A,
    B,
    C,
    chunk_size,
    D=None,
    z=None,
    dt_bias=None,
    initial_states=None,
    seq_idx=None,
    cu_seqlens=None,
    dt_softplus=False,
    dt_limit=(0.0, float("inf")),
    return_final_states=False,
    return_varlen_states=False,
):
    """The library's signature and shapes; its documents too: the initial state is of the document numbered 0."""
    batch, length, heads, width = x.shape
    assert (dt.shape, A.shape, C.shape) == ((batch, length, heads), (heads,), B.shape)
    assert x.dtype == B.dtype == C.dtype
    assert all(torch.finfo(tensor.dtype).bits >= 32 for tensor in (dt, A))
    assert D is z is dt_bias is cu_seqlens is None
    assert (dt_softplus, return_varlen_states, dt_limit) == (False, False, (0.0, float("inf")))
    assert seq_idx is None or (seq_idx.shape == (batch, length) and seq_idx.dtype == torch.int32)
    assert chunk_size & (chunk_size - 1) == 0
    value, step, rate, write, read = (tensor.double() for tensor in (x, dt, A, B, C))
    write, read = (tensor.repeat_interleave(heads // B.shape[2], dim=2) for tensor in (write, read))
    if initial_states is None:
        state = value.new_zeros(batch, heads, width, B.shape[-1])
    else:
        assert initial_states.shape == (batch, heads, width, B.shape[-1])
        state = initial_states.double()
    document, outputs = torch.zeros(batch, dtype=torch.int32), []
    for t in range(length):
        if seq_idx is not None:
            state = state * (seq_idx[:, t] == document)[:, None, None, None]
            document = seq_idx[:, t]
        update = (step[:, t, :, None] * value[:, t])[..., None] * write[:, t, :, None]
        state = (step[:, t] * rate).exp()[..., None, None] * state + update
        outputs.append((state * read[:, t, :, None]).sum(-1))
    wide = torch.promote_types(x.dtype, torch.float32)
    y = torch.stack(outputs, dim=1).to(x.dtype)
    return (y, state.to(wide)) if return_final_states else y


def inputs(length: int, groups: int, *, device: torch.device = CPU, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Δ, A, B, C, x of the sizes that kernels take, a few steps of zero, as at padding; Δ and A stay wide."""
    torch.manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    step = F.softplus(torch.randn(2, length, 4, dtype=wide))
    step[1, -3:] = 0
    rate = -torch.tensor([1.0, 0.3, 0.05, 0.01], dtype=wide)
    narrow = (torch.randn(2, length, *shape).to(dtype) for shape in ((groups, 32), (groups, 32), (4, 64)))
    return tuple(tensor.to(device) for tensor in (step, rate, *narrow))


def ours(*tensors, initial_state_BHPN, resets_BT):
    return mamba_ssm_scan(*tensors, initial_state_BHPN, resets_BT)


def recurrence(step, rate, B, C, x, **options):
    return scan_reference(step * rate, B, C, x * step[..., None], **options)


@pytest.fixture
def stand_in(monkeypatch):
    """As if the library were installed and ran on the CPU; the list has the arguments' dtypes of every call."""
    calls: list[dict[str, torch.dtype]] = []

    def kernel(x, dt, *others, **options):
        calls.append({"x": x.dtype, "dt": dt.dtype})
        return mamba_chunk_scan_combined(x, dt, *others, **options)

    module = ModuleType(MODULE)
    monkeypatch.setattr(module, "mamba_chunk_scan_combined", kernel, raising=False)
    monkeypatch.setitem(sys.modules, MODULE, module)
    return calls


@pytest.fixture
def on_this_device(monkeypatch, stand_in):
    """DISTILL_SCAN=mamba_ssm, and CPU tensors taken for CUDA's."""
    obstacle = backends.obstacle
    monkeypatch.setattr(backends, "_import_problem", lambda module, package: None)
    monkeypatch.setattr(
        backends, "obstacle", lambda name, device, dtype, **options: obstacle(name, CUDA, torch.bfloat16, **options)
    )
    monkeypatch.setenv(backends.CHOICE, "mamba_ssm")
    return stand_in


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("with_resets", [False, True])
def test_the_words_of_mamba_ssm(stand_in, groups, with_state, with_resets):
    arguments = inputs(70, groups, dtype=torch.float64)
    initial = torch.randn(2, 4, 64, 32, dtype=torch.float64) if with_state else None
    resets = borders(70) if with_resets else None
    got = outputs_and_gradients(ours, arguments, initial, resets)
    close(got, outputs_and_gradients(recurrence, arguments, initial, resets), 1e-12)
    assert len(stand_in) == 1


def test_a_document_that_begins_at_once_reads_no_state(stand_in):
    step, rate, B, C, x = inputs(5, 4, dtype=torch.float64)
    initial = torch.randn(2, 4, 64, 32, dtype=torch.float64)
    resets = torch.zeros(2, 5, dtype=torch.bool)
    resets[0, 0] = True
    y, _ = mamba_ssm_scan(step, rate, B, C, x, initial, resets)
    fresh, _ = mamba_ssm_scan(step, rate, B, C, x, None, None)
    assert torch.equal(y[0], fresh[0])
    assert not torch.allclose(y[1], fresh[1])


def mixer(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    made = MIXERS[name](hidden_size=24, n_heads=3, head_dim=5, state_dim=4).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made


def padded() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states of 30 positions, their validity and the borders of two documents."""
    torch.manual_seed(1)
    valid = torch.ones(2, 30, dtype=torch.bool)
    valid[1, 26:] = False
    resets = torch.zeros(2, 30, dtype=torch.bool)
    resets[0, [0, 11]] = True
    return torch.randn(2, 30, 24, dtype=torch.float64), valid, resets


def forward_and_gradients(layer: torch.nn.Module, *, packed: bool) -> tuple[Tensor, ...]:
    """The output, and the gradients of the hidden states and of every parameter."""
    hidden, valid, resets = padded()
    leaves = [hidden.requires_grad_(), *layer.parameters()]
    output, _ = layer(hidden, valid_BT=valid, resets_BT=resets if packed else None)
    torch.manual_seed(2)
    return output.detach(), *torch.autograd.grad((output * torch.randn_like(output)).sum(), leaves)


@pytest.mark.parametrize("packed", [False, True])
def test_mamba2_is_the_same_by_either(monkeypatch, on_this_device, packed):
    layer = mixer("mamba2")
    got = forward_and_gradients(layer, packed=packed)
    assert len(on_this_device) == 1
    monkeypatch.setenv(backends.CHOICE, "torch")
    close(got, forward_and_gradients(layer, packed=packed), 1e-10)
    assert len(on_this_device) == 1


def test_a_cache_goes_from_one_to_the_other(monkeypatch, on_this_device):
    """Two pieces by the kernel and single steps, which are no scan, give what one pass of plain torch gives."""
    layer = mixer("mamba2")
    hidden, valid, _ = padded()
    pieces = ((0, 12), (12, 28), (28, 29), (29, 30))
    cache = adopt(DynamicCache(), [0], 1)
    whole = adopt(DynamicCache(), [0], 1)
    with torch.no_grad():
        got = [layer(hidden[:, a:b], cache=cache, valid_BT=valid[:, a:b])[0] for a, b in pieces]
        assert len(on_this_device) == 2
        monkeypatch.setenv(backends.CHOICE, "torch")
        expected, _ = layer(hidden, cache=whole, valid_BT=valid)
    close((torch.cat(got, dim=1), cache.layers[0].state()), (expected, whole.layers[0].state()), 1e-10)


def test_the_step_stays_wide_where_the_layer_computes_in_bfloat16(on_this_device):
    layer = mixer("mamba2").float()
    hidden, *_ = padded()
    with torch.autocast("cpu", torch.bfloat16):
        layer(hidden.float())
    assert on_this_device == [{"x": torch.bfloat16, "dt": torch.float32}]


def test_a_mixer_without_a_step_is_refused(on_this_device):
    hidden, *_ = padded()
    with pytest.raises(UserError, match="DISTILL_SCAN=mamba_ssm: not here, it serves mamba2 only"):
        mixer("discrete_mamba2")(hidden)
    assert on_this_device == []


@pytest.fixture
def installed(monkeypatch):
    """Which libraries import: none until the test says so."""
    names: set[str] = set()
    monkeypatch.delenv(backends.CHOICE, raising=False)
    monkeypatch.setattr(
        backends, "_import_problem", lambda module, package: None if module.split(".")[0] in names else "not installed"
    )
    return names


@pytest.mark.parametrize(
    ("libraries", "stepped", "expected"),
    [
        ((), True, "torch"),
        (("mamba_ssm",), True, "mamba_ssm"),
        (("mamba_ssm",), False, "torch"),
        (("fla",), True, "fla"),
        (("fla", "mamba_ssm"), True, "fla"),
        (("fla", "mamba_ssm"), False, "fla"),
    ],
)
def test_who_comes_first_on_cuda(installed, libraries, stepped, expected):
    installed.update(libraries)
    assert backends.backend(CUDA, torch.bfloat16, stepped=stepped) == expected
    assert backends.backend(CUDA, torch.float64, stepped=stepped) == "torch"
    assert backends.backend(CUDA, torch.float32, stepped=stepped) == "torch"
    assert backends.backend(CPU, torch.bfloat16, stepped=stepped) == "torch"


def test_compiled_code_is_not_given_what_cannot_be_traced(monkeypatch, installed):
    installed.add("mamba_ssm")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert backends.backend(CUDA, torch.bfloat16, stepped=True) == "torch"


def test_doctor_knows_whom_each_mixer_is_served_by(monkeypatch, installed):
    gpu = {"gpus": [{"bfloat16": True}]}
    assert {*doctor._STEPPED, *doctor._UNSCANNED} == KINDS.keys()
    told = doctor._scan_backends(gpu)
    assert told["mamba_ssm"] == {"used": False, "why": "not used: not installed"}

    installed.add("mamba_ssm")
    told = doctor._scan_backends(gpu)
    assert [name for name, backend in told.items() if backend["used"]] == ["mamba_ssm", "torch"]
    assert told["mamba_ssm"]["why"].endswith("which serve mamba2 only; runs mamba2 here")
    assert told["torch"]["why"].endswith("runs discrete_mamba2, based, hedgehog here")

    installed.add("fla")
    told = doctor._scan_backends(gpu)
    assert [name for name, backend in told.items() if backend["used"]] == ["fla"]
    assert told["mamba_ssm"]["why"] == "not used: fla comes first, for every mixer that scans"

    monkeypatch.setenv(backends.CHOICE, "mamba_ssm")
    told = doctor._scan_backends(gpu)
    assert [name for name, backend in told.items() if backend["used"]] == ["mamba_ssm"]
    assert "DISTILL_SCAN=mamba_ssm asks for it" in told["mamba_ssm"]["why"]
    assert told["fla"]["why"] == "not used: DISTILL_SCAN=mamba_ssm asks for another"
    assert "it serves mamba2 only" in told["discrete_mamba2"]["why"]


@needs_kernel
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 4e-3), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("length", [200, 2 * MAMBA_SSM_CHUNK + 30])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("with_resets", [False, True])
def test_the_kernel_is_the_recurrence(dtype, tolerance, length, groups, with_state, with_resets):
    """Within one chunk and across several, documents that end in a later one; TF32 has 10 bits of mantissa."""
    arguments = inputs(length, groups, device=CUDA, dtype=dtype)
    initial = torch.randn(2, 4, 64, 32) if with_state else None
    resets = borders(length) if with_resets else None
    if resets is not None and length > MAMBA_SSM_CHUNK:
        resets[0, MAMBA_SSM_CHUNK] = resets[1, MAMBA_SSM_CHUNK + 9] = True

    def on_gpu(*tensors, **options):
        y, final = ours(*tensors, **options)
        return y.cpu(), final.cpu()

    moved = (None if tensor is None else tensor.to(CUDA) for tensor in (initial, resets))
    exact = tuple(argument.double().cpu() for argument in arguments)
    expected = outputs_and_gradients(recurrence, exact, None if initial is None else initial.double(), resets)
    close(outputs_and_gradients(on_gpu, arguments, *moved), expected, tolerance)
