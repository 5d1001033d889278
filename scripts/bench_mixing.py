"""The mixing distance, forward and backward: in strips against both T×T matrices written out.

    python -m scripts.bench_mixing                                   # CPU, fp32; about ten minutes on two cores
    python -m scripts.bench_mixing --device cuda --dtype bfloat16

One sequence, 8 heads of width 64 and state 64. Times are medians of calls that take turns. Peaks are what a call adds
to what was there before it, each in a fresh process. Where the matrices would not fit the memory there is, that is said
instead of trying.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn import functional as F

from distill.errors import UserError
from distill.objectives import attention_matrix, mixing_distance, streamed_mixing_distance
from distill.programs import report_user_errors
from distill.ssd import mixing_matrix
from distill.ssd.factors import MatrixFactors
from distill.units import size
from scripts.measure import device_and_dtype, peak_memory, record, require_file, seconds, show

HEADS, WIDTH, STATE = 8, 64, 64
LENGTHS = (512, 1024, 2048, 4096, 8192)
MATRICES = 10
"""T×T matrices, all heads, fp32, that the written-out form holds at once: about as many as `peak_memory` finds."""

Factors = tuple[Tensor, ...]


@report_user_errors()
def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[
        str, typer.Option(help="Of the factors, queries and keys: float32, bfloat16, float64.")
    ] = "float32",
    lengths: Annotated[str, typer.Option(help="Tokens, separated by commas.")] = ",".join(map(str, LENGTHS)),
    keys: Annotated[int, typer.Option(help="Key heads of the teacher.")] = HEADS,
    repeats: Annotated[int, typer.Option(help="Timed calls of each form.")] = 5,
    output: Annotated[Path | None, typer.Option(help="Also write the figures here, as JSON.")] = None,
) -> None:
    """Measure, print a table, and write the figures down."""
    require_file(output)
    device_and_dtype(device, dtype, ("float32", "bfloat16", "float64"))
    rows = []
    for length in _lengths(lengths):
        arguments = (length, keys, device, dtype)
        fits = _available(device) > MATRICES * HEADS * length**2 * (8 if dtype == "float64" else 4)
        contenders = {"streamed": streamed(*arguments)} | ({"written out": written_out(*arguments)} if fits else {})
        # The written-out form at length is slow, and few calls of it say enough.
        times = seconds(contenders, repeats if length <= 2048 else min(repeats, 3))
        del contenders
        peaks = {"streamed": peak_memory(streamed, *arguments, threads=torch.get_num_threads())}
        if fits:
            peaks["written out"] = peak_memory(written_out, *arguments, threads=torch.get_num_threads())
        rows.append({"tokens": length, "seconds": times, "peak_bytes": peaks})
        typer.echo(f"{length} tokens: {times}, {peaks}", err=True)
    about = {"heads": HEADS, "key_heads": keys, "width": WIDTH, "state": STATE, "device": device, "dtype": dtype}
    if output:
        record(output, {**about, "rows": rows})
    head = ("tokens", "streamed", "written out", "ratio", "peak, streamed", "peak, written out", "ratio")
    show(f"mixing distance, forward and backward, {HEADS} heads, {device}, {dtype}", head, map(_shown, rows))


def _lengths(given: str) -> list[int]:
    parts = [part.strip() for part in given.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise UserError(f"--lengths is {given!r}; give numbers of tokens separated by commas, such as 512,1024")
    return list(map(int, parts))


def streamed(length: int, keys: int, device: str, dtype: str) -> Callable[[], object]:
    """Forward and backward of `streamed_mixing_distance`."""
    factors, q_BHTD, k_BKTD = _inputs(length, keys, device, dtype)
    return lambda: torch.autograd.grad(
        streamed_mixing_distance(MatrixFactors(*factors), q_BHTD, k_BKTD, scaling=WIDTH**-0.5), factors
    )


def written_out(length: int, keys: int, device: str, dtype: str) -> Callable[[], object]:
    """The same by `mixing_distance` of both matrices, as `state_space.ScanTerms.matrix` makes the student's."""
    factors, q_BHTD, k_BKTD = _inputs(length, keys, device, dtype)

    def call() -> object:
        with torch.no_grad():
            k_BHTD = k_BKTD.repeat_interleave(HEADS // keys, dim=1)
            teacher_BHTT = attention_matrix(q_BHTD, k_BHTD, scaling=WIDTH**-0.5)
        log_decay_BTH, B_BTHN, C_BTHN, step_BTH, skip_H = (
            factor.to(torch.promote_types(factor.dtype, torch.float32)) for factor in factors
        )
        student_BHTT = mixing_matrix(log_decay_BTH, B_BTHN, C_BTHN) * step_BTH.mT[:, :, None, :]
        student_BHTT = student_BHTT + torch.diag_embed(skip_H[:, None].expand(-1, length))
        return torch.autograd.grad(mixing_distance(student_BHTT, teacher_BHTT), factors)

    return call


def _inputs(length: int, keys: int, device: str, dtype: str) -> tuple[Factors, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(getattr(torch, dtype))

    step_BTH = F.softplus(normal(1, length, HEADS))
    log_decay_BTH = -step_BTH * torch.logspace(-2, -8, HEADS, base=2, device=device).to(step_BTH.dtype)
    reads_and_writes = (normal(1, length, HEADS, STATE) * STATE**-0.5 for _ in range(2))
    factors = (log_decay_BTH, *reads_and_writes, step_BTH, normal(HEADS))
    return (
        tuple(factor.requires_grad_() for factor in factors),
        normal(1, HEADS, length, WIDTH),
        normal(1, keys, length, WIDTH),
    )


def _available(device: str) -> int:
    """Bytes of memory that are free, for new processes too."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    raise SystemExit("cannot read from /proc/meminfo how much memory there is")


def _shown(row: dict[str, Any]) -> tuple[str, ...]:
    times, peaks = row["seconds"], row["peak_bytes"]
    cells = (f"{row['tokens']}", f"{times['streamed'] * 1e3:.0f} ms")
    if "written out" not in times:
        return *cells, "does not fit", "", size(peaks["streamed"]), "does not fit", ""
    return (
        *cells,
        f"{times['written out'] * 1e3:.0f} ms",
        f"{times['streamed'] / times['written out']:.2f}",
        size(peaks["streamed"]),
        size(peaks["written out"]),
        f"1/{peaks['written out'] / peaks['streamed']:.1f}",
    )


if __name__ == "__main__":
    typer.run(main)
