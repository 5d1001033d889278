"""The state-space scan, forward and backward, beside everybody else's: seconds and memory.

    python -m scripts.bench_scan                                         # transformers and SDPA, which are installed
    python -m scripts.bench_scan --mamba-ssm CHECKOUT --lengths 1024     # a checkout of github.com/state-spaces/mamba
    python -m scripts.bench_scan --device cuda --dtype bfloat16          # on a GPU; adds the kernels that are installed

Every contender gets the same x, step Δ, A, B and C (one B and C per head, as after conversion) and takes
y = scan(Δ A, B, C, Δ x) and the gradients of all five. transformers' is the function that its Mamba-2 layer calls, with
the layer's default chunk of 256 and with 64. mamba-ssm's references are pure PyTorch but import Triton, as
flash-linear-attention's does: they join where it is installed. Attention is torch's causal SDPA on as many heads of the
same widths, without decay, and no substitute: it is there for scale.

Times are medians of calls that take turns; memory is what a call adds at its worst moment in a fresh process.
"""

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn import functional as F

from distill.programs import report_user_errors
from distill.ssd import scan
from distill.ssd.chunked import CHUNK, chunked_scan
from distill.ssd.kernels import mamba_ssm_scan
from scripts.measure import Call, device_and_dtype, peak_memory, record, require_file, seconds, show

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""y_BTHP of x_BTHP, step_BTH, A_H, B_BTHN, C_BTHN."""


def ours(x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    return scan(step * A, B, C, x * step[..., None])[0]


def readable(x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    # All in fp32, as `scan` has it; in 16 bits x times its step would be wider than B and C.
    decay, write, read, value = (tensor.float() for tensor in (step * A, B, C, x * step[..., None]))
    return chunked_scan(decay, write, read, value, None, None, CHUNK)[0].to(x.dtype)


def attention(x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    q, k, v = (tensor.transpose(1, 2) for tensor in (C, B, (x * step[..., None]).to(x.dtype)))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def transformers_scan(chunk: int) -> Scan:
    from transformers.models.mamba2 import modeling_mamba2

    # Since 5.23; before, it stood inside the layer's torch_forward. Unwrapped, as it would turn into mamba-ssm's kernel
    # wherever that can be imported, on CPU tensors too.
    function: Any = inspect.unwrap(modeling_mamba2.mamba2_chunk_scan)
    return lambda x, step, A, B, C: function(x, step, A, B, C, chunk_size=chunk)


def mamba_ssm_minimal(checkout: str | None) -> Scan:
    function = _of_mamba_ssm(checkout, "mamba_ssm.modules.ssd_minimal").ssd_minimal_discrete
    return lambda x, step, A, B, C: function(x * step[..., None], step * A, B, C, CHUNK)[0]


def mamba_ssm_reference(checkout: str | None) -> Scan:
    function = _of_mamba_ssm(checkout, "mamba_ssm.ops.triton.ssd_combined").ssd_chunk_scan_combined_ref
    return lambda x, step, A, B, C: function(x, step, A, B, C, CHUNK)


def mamba_ssm_kernel(checkout: str | None) -> Scan:
    """As students call it, through our wrapper and with its chunk."""
    function = _of_mamba_ssm(checkout, "mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    return lambda x, step, A, B, C: mamba_ssm_scan(step, A, B, C, x, None, None, function)[0]


def fla_naive() -> Scan:
    function = importlib.import_module("fla.ops.simple_gla.naive").naive_chunk_simple_gla
    return lambda x, step, A, B, C: function(C, B, x * step[..., None], step * A, scale=1.0, chunk_size=CHUNK)[0]


def contender(name: str, checkout: str | None) -> Scan:
    """A contender by its name in the table; raises ImportError where its library is missing."""
    makers: dict[str, Callable[[], Scan]] = {
        "distill": lambda: ours,
        "distill, autograd": lambda: readable,
        "distill, compiled": lambda: torch.compile(ours),
        "transformers, chunk 256": lambda: transformers_scan(256),
        "transformers, chunk 64": lambda: transformers_scan(64),
        "mamba-ssm minimal": lambda: mamba_ssm_minimal(checkout),
        "mamba-ssm reference": lambda: mamba_ssm_reference(checkout),
        "mamba-ssm kernel": lambda: mamba_ssm_kernel(checkout),
        "fla naive": fla_naive,
        "SDPA": lambda: attention,
    }
    return makers[name]()


def step_of(name: str, checkout: str | None, length: int, shape: tuple[int, int, int, int], *where: Any) -> Call:
    """One forward and backward of a contender on random inputs; at the top of the module, so that it pickles."""
    function = contender(name, checkout)
    leaves, weight_BTHP = inputs(length, shape, *where)
    return lambda: torch.autograd.grad(function(*leaves), leaves, weight_BTHP, allow_unused=True)


def inputs(length: int, shape: tuple[int, int, int, int], device: str, dtype: str) -> tuple[tuple[Tensor, ...], Tensor]:
    """(x, step, A, B, C), and what y is weighted with."""
    batch, heads, head_dim, state_dim = shape
    torch.manual_seed(0)
    options: dict[str, Any] = {"device": device, "dtype": DTYPES[dtype]}
    x, weight = (torch.randn(batch, length, heads, head_dim, **options) for _ in range(2))
    B, C = (torch.randn(batch, length, heads, state_dim, **options) for _ in range(2))
    step = F.softplus(torch.randn(batch, length, heads, device=device))
    A = -torch.logspace(-8, -2, heads, base=2, device=device)  # memories of 4 to 256 positions, as after conversion
    return tuple(leaf.requires_grad_() for leaf in (x, step, A, B, C)), weight


@report_user_errors()
def main(
    lengths: Annotated[list[int] | None, typer.Option(help="Tokens a sequence; may be given again.")] = None,
    batch: Annotated[int, typer.Option(help="Sequences.")] = 2,
    heads: Annotated[int, typer.Option(help="Heads of the scan.")] = 16,
    head_dim: Annotated[int, typer.Option(help="Channels a head.")] = 64,
    state_dim: Annotated[int, typer.Option(help="Numbers of state a channel.")] = 64,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help=f"Of x, B and C: {', '.join(DTYPES)}.")] = "float32",
    repeats: Annotated[int, typer.Option(help="Timed calls of each.")] = 7,
    threads: Annotated[int | None, typer.Option(help="torch's threads; its default if not given.")] = None,
    mamba_ssm: Annotated[Path | None, typer.Option(help="A checkout of mamba-ssm, if not installed.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Contenders by name; may be given again.")] = None,
    memory: Annotated[bool, typer.Option(help="Measure peak memory as well.")] = True,
    output: Annotated[Path | None, typer.Option(help="Also write the figures here, as JSON.")] = None,
) -> None:
    """Measure every contender that is there, length by length."""
    require_file(output)
    device_and_dtype(device, dtype, list(DTYPES))
    if threads:
        torch.set_num_threads(threads)
    checkout = str(mamba_ssm) if mamba_ssm else None
    names = [name for name in only or names_for(device) if _available(name, checkout)]
    shape = (batch, heads, head_dim, state_dim)
    rows: list[dict[str, Any]] = []
    for length in lengths or [1024, 2048, 4096, 8192, 16384]:
        where = (length, shape, device, dtype)
        times = seconds({name: step_of(name, checkout, *where) for name in names}, repeats)
        for name in names:
            peak = peak_memory(step_of, name, checkout, *where, threads=threads) if memory else None
            rows.append({"length": length, "contender": name, "seconds": times[name], "peak_bytes": peak})
    table = [
        (
            row["length"],
            row["contender"],
            f"{row['seconds'] * 1e3:.1f}",
            f"{row['seconds'] / _of_ours(rows, row, 'seconds'):.2f}",
            "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}",
        )
        for row in rows
    ]
    title = f"{batch} × length × {heads} heads × {head_dim}, state {state_dim}, {dtype} on {device}"
    show(title, ("length", "contender", "ms, forward + backward", f"of {names[0]}", "peak MiB"), table)
    if output:
        record(
            output, {"shape": dict(zip(("batch", "heads", "head_dim", "state_dim"), shape, strict=True)), "rows": rows}
        )


def names_for(device: str) -> list[str]:
    """Contenders in the order of the table."""
    torch_only = ["transformers, chunk 256", "transformers, chunk 64", "mamba-ssm minimal", "mamba-ssm reference"]
    kernels = ["mamba-ssm kernel"] if device == "cuda" else []
    return ["distill", "distill, autograd", *torch_only, "fla naive", *kernels, "SDPA"]


def _available(name: str, checkout: str | None) -> bool:
    try:
        contender(name, checkout)
    except ImportError as error:
        print(f"without {name}: {error}", file=sys.stderr)
        return False
    return True


def _of_ours(rows: list[dict[str, Any]], row: dict[str, Any], key: str) -> float:
    return next(other[key] for other in rows if other["length"] == row["length"])


def _of_mamba_ssm(checkout: str | None, module: str) -> ModuleType:
    """A module of the installed package, or of a checkout whose package's own imports, which want CUDA, are skipped."""
    if checkout and "mamba_ssm" not in sys.modules:
        package = ModuleType("mamba_ssm")
        package.__path__ = [str(Path(checkout) / "mamba_ssm")]
        sys.modules["mamba_ssm"] = package
    return importlib.import_module(module)


if __name__ == "__main__":
    typer.run(main)
