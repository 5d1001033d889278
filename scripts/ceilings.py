"""What this device reaches where nothing stands in its way: a large matmul, and a large copy.

    python -m scripts.ceilings --device cuda --dtype bfloat16

Beside these, not beside a data sheet's, stands what a benchmark reaches: they hold for this device's clock, power limit
and memory. A matmul of two n×n matrices is 2 n³ operations; a copy reads and writes every byte once.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer

from distill.programs import report_user_errors
from scripts.measure import DTYPES, device_and_dtype, record, require_file, seconds, show


@report_user_errors()
def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda",
    dtype: Annotated[str, typer.Option(help=f"Of the matrices: {', '.join(DTYPES)}.")] = "bfloat16",
    size: Annotated[int, typer.Option(help="n: rows and columns of each matrix.")] = 8192,
    mebibytes: Annotated[int, typer.Option(help="That are copied.")] = 2048,
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls of each, in each of three rounds.")] = 20,
    output: Annotated[Path | None, typer.Option(help="Also write the figures here, as JSON.")] = None,
) -> None:
    """Measure both and print them."""
    require_file(output)
    place, precision = device_and_dtype(device, dtype)
    left, right = (torch.randn(size, size, device=place, dtype=precision) for _ in range(2))
    product = torch.empty_like(left)
    source = torch.zeros(mebibytes * 2**20, dtype=torch.uint8, device=place)
    target = torch.empty_like(source)
    # The fastest of several medians: a device needs a moment until its clock is up.
    rounds = [
        seconds({"matmul": lambda: torch.mm(left, right, out=product), "copy": lambda: target.copy_(source)}, repeats)
        for _ in range(3)
    ]
    times = {name: min(round_[name] for round_ in rounds) for name in ("matmul", "copy")}
    figures = {"flops": 2 * size**3 / times["matmul"], "bytes_per_second": 2 * source.nbytes / times["copy"]}
    rows = [
        (f"{size}×{size} matmul, {dtype}", f"{figures['flops'] / 1e12:.2f} TFLOP/s"),
        (f"copy of {mebibytes} MiB, read and written", f"{figures['bytes_per_second'] / 1e9:.1f} GB/s"),
    ]
    show(f"ceilings of {device}", ("", ""), rows)
    if output:
        record(output, {"device": device, "dtype": dtype, **figures})


if __name__ == "__main__":
    typer.run(main)
