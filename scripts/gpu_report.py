"""The page that `scripts.gpu_check` writes: the figures of its sections beside the ceilings of the device.

TFLOP/s and GB/s of an operation are what it *has* to calculate and move, as the formulas below count it, over the time
it took: what an implementation does twice does not make it look faster.
"""

import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch

from distill.ssd.chunked import CHUNK
from scripts.gpu_sections import PARITY
from scripts.measure import circumstances

Figures = Mapping[str, Any]
KERNELS = ("flash-linear-attention", "mamba-ssm", "causal-conv1d", "liger-kernel", "triton")


class Ceilings(NamedTuple):
    """What the device reached in `scripts.ceilings`; None where that was not measured."""

    flops: float | None
    bytes_per_second: float | None

    def cells(self, flops: float | None, moved: float | None) -> tuple[str, str]:
        """TFLOP/s and GB/s, each with its share of the ceiling."""
        return _beside(flops, self.flops, 1e12), _beside(moved, self.bytes_per_second, 1e9)


def page(
    device: str, dtype: str, small: bool, ended: Iterable[tuple[str, str, float]], figures: Mapping[str, Figures]
) -> str:
    """Markdown: circumstances, parity, benchmarks, and how every section ended."""
    measured, ended = figures.get("ceilings", {}), list(ended)
    ceilings = Ceilings(measured.get("flops"), measured.get("bytes_per_second"))
    lines = [f"# {_device_name(device)}", "", *_circumstances(device, dtype), ""]
    if small:
        lines += ["**A trial of the program at tiny sizes: the timings on this page mean nothing.**", ""]
    lines += ["## Ceilings", "", *table(("", ""), _ceilings(ceilings)), ""]
    lines += ["## Parity", "", *_parity(figures, {name: said for name, said, _ in ended}), ""]
    for name, of_one in figures.items():
        maker = next((maker for start, maker in TABLES.items() if name.startswith(start)), None)
        if maker:
            lines += [
                f"## {name[0].upper()}{name[1:]}",
                "",
                *maker(of_one, ceilings, 2 if dtype != "float32" else 4),
                "",
            ]
    lines += ["## How the sections ended", ""]
    lines += table(("section", "", "s"), ((name, said, f"{took:.0f}") for name, said, took in ended))
    return "\n".join(lines) + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; its first column is on the left."""
    marks = ["---"] + ["---:"] * (len(head) - 1)
    return [f"| {' | '.join(cells)} |" for cells in [head, marks, *rows]]


def scan(figures: Figures, ceilings: Ceilings, size: int) -> list[str]:
    """Per token and head, in chunks of Q: C Bᵀ and its product with x, 2 Q (N + P) / 2; states in and out, 4 N P.

    Backward is twice that. Moved: forward reads x, B, C and writes y; backward reads them and ∂y, writes ∂x, ∂B, ∂C.
    Attention is there for scale, and has other counts.
    """
    shape = figures["shape"]
    P, N = shape["head_dim"], shape["state_dim"]

    def row(one: Figures) -> tuple[str, ...]:
        places = shape["batch"] * one["length"] * shape["heads"]
        flops = 3 * places * (CHUNK * (N + P) + 4 * N * P) / one["seconds"]
        moved = places * (5 * P + 6 * N) * size / one["seconds"]
        cells = ("", "") if one["contender"] == "SDPA" else ceilings.cells(flops, moved)
        return f"{one['length']:,}", one["contender"], f"{one['seconds'] * 1e3:.2f}", *cells

    about = f"{shape['batch']} sequences, {shape['heads']} heads × {P}, state {N}; forward and backward."
    return [about, "", *table(("length", "", "ms", "TFLOP/s", "GB/s"), map(row, figures["rows"]))]


def mixing(figures: Figures, ceilings: Ceilings, size: int) -> list[str]:
    """Per pair of positions and head: both scores, 2 (D + N), and the gradients of B and C, 4 N; half are masked."""
    per_pair = figures["heads"] * (2 * figures["width"] + 6 * figures["state"])

    def row(one: Figures, form: str) -> tuple[str, ...]:
        flops = one["tokens"] ** 2 / 2 * per_pair / one["seconds"][form]
        peak = f"{one['peak_bytes'][form] / 2**20:,.0f}"
        return f"{one['tokens']:,}", form, f"{one['seconds'][form] * 1e3:.2f}", ceilings.cells(flops, None)[0], peak

    rows = (row(one, form) for one in figures["rows"] for form in one["seconds"])
    about = f"One sequence, {figures['heads']} heads, width {figures['width']}, state {figures['state']}."
    return [about, "", *table(("tokens", "", "ms", "TFLOP/s", "peak MiB"), rows)]


def logits(figures: Figures, ceilings: Ceilings, size: int) -> list[str]:
    """Four products of tokens × hidden × vocabulary: the teacher's logits, the student's, and their two gradients.

    Moved: the teacher's weight, the student's in fp32, its gradient. Where chunks pass, weights are read again.
    """
    tokens, hidden = figures["tokens"], figures["hidden"]

    def rows() -> Iterator[tuple[str, ...]]:
        for vocabulary, contenders in figures.items():
            if not vocabulary.endswith("K") or not isinstance(contenders, dict):
                continue
            weights = int(vocabulary[:-1]) * 1024 * hidden
            for name, one in contenders.items():
                cells = ceilings.cells(8 * tokens * weights / one["seconds"], weights * (size + 8) / one["seconds"])
                peak = f"{one['bytes'] / 2**20:,.0f}"
                yield vocabulary, name, f"{one['seconds'] * 1e3:.1f}", f"{one['times_naive']:.2f}", *cells, peak

    head = ("vocabulary", "", "ms", "× naive", "TFLOP/s", "GB/s", "peak MiB")
    return [f"{tokens:,} tokens, hidden {hidden}; forward and backward.", "", *table(head, rows())]


def steps(figures: Figures, ceilings: Ceilings, size: int) -> list[str]:
    """Operations as torch counts the step's matrix products."""
    made, teacher = figures["size"], figures["size"]["teacher"]

    def row(one: Figures) -> tuple[str, ...]:
        ratio = f"{one['ratio']:.3f} (at most {one['target']:.2f}{'' if one['ratio'] <= one['target'] else ', missed'})"
        speed = f"{made['batch'] * made['length'] / one['step']:,.0f}"
        times = (f"{one['step'] * 1e3:.1f}", f"{one['floor'] * 1e3:.1f}")
        return one["stage"], *times, ratio, speed, ceilings.cells(one["flops"], None)[0]

    head = ("stage", "step, ms", "floor, ms", "step / floor", "tokens/s", "TFLOP/s")
    about = f"{teacher['layers']} layers × {teacher['hidden']}, {made['batch']} × {made['length']} tokens a step."
    return [about, "", *table(head, map(row, figures["rows"]))]


def decoding(figures: Figures, ceilings: Ceilings, size: int) -> list[str]:
    """Moved: weights and cache, once a step."""
    shape, run = figures["shape"], figures["run"]
    teachers = (one for one in figures["rows"] if one["model"] == "teacher")
    teacher = {(one["cache"], one["context"]): one["tokens_per_second"] for one in teachers}

    def row(one: Figures) -> tuple[str, ...]:
        speed, beside = one["tokens_per_second"], teacher[one["cache"], one["context"]]
        moved = speed and speed / run["batch"] * one["read_bytes"]
        ratio = f"{speed / beside:.2f}" if speed and beside else ""
        told = f"{speed:,.1f}" if speed else "does not fit"
        cached = f"{one['cache_bytes'] / 2**20:,.0f}"
        return f"{one['context']:,}", one["model"], one["cache"], told, ratio, ceilings.cells(None, moved)[1], cached

    compiled = "compiled" if run["compiled"] else "not compiled"
    about = f"{shape['layers']} layers × {shape['hidden']}, batch {run['batch']}, {compiled}."
    head = ("context", "", "cache", "tokens/s", "× teacher", "GB/s", "cache, MiB")
    return [about, "", *table(head, map(row, figures["rows"]))]


TABLES: dict[str, Callable[[Figures, Ceilings, int], list[str]]] = {
    "scan": scan,
    "mixing": mixing,
    "logits": logits,
    "steps": steps,
    "decoding": decoding,
}


def _parity(figures: Mapping[str, Figures], ended: Mapping[str, str]) -> list[str]:
    """A verdict, and the rows of all programs that compare, also of one that did not finish."""
    names = [section.name for section in PARITY]
    found = [row for name in names if name in figures for row in figures[name]["rows"]]
    if any(row["failed"] for row in found):
        verdict = "**Something computes what its reference does not.**"
    elif open_ones := [name for name in names if not ended.get(name, "").startswith(("done", "left out"))]:
        verdict = f"Not established, not everything finished: {', '.join(open_ones)}."
    else:
        verdict = "All within what is allowed."
    rows = (
        (
            row["what"],
            row["dtype"].removeprefix("torch."),
            "" if row["error"] is None else f"{row['error']:.1e}",
            f"{row['allowed']:.0e}",
            f"**FAILED** {row['note']}" if row["failed"] else row["note"],
        )
        for row in found
    )
    return [verdict, "", *table(("", "dtype", "error", "allowed", ""), rows)]


def _ceilings(ceilings: Ceilings) -> list[tuple[str, str]]:
    flops = "not measured" if ceilings.flops is None else f"{ceilings.flops / 1e12:.2f} TFLOP/s"
    moved = "not measured" if ceilings.bytes_per_second is None else f"{ceilings.bytes_per_second / 1e9:.1f} GB/s"
    return [("a large matmul", flops), ("a large copy, read and written", moved)]


def _circumstances(device: str, dtype: str) -> list[str]:
    told = circumstances()
    versions = told["versions"] | {name: found for name in KERNELS if (found := _version(name))}
    lines = [
        f"- {datetime.now(UTC):%Y-%m-%d}, {dtype}",
        f"- {told['machine']}, {told['cores']} cores",
        f"- Python {told['python']}, " + ", ".join(f"{name} {found}" for name, found in versions.items()),
    ]
    return [*lines, f"- driver {_driver()}, CUDA {torch.version.cuda}"] if device == "cuda" else lines


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        told = []
    return told[0] if told else "unknown"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _beside(value: float | None, ceiling: float | None, unit: float) -> str:
    if value is None:
        return ""
    share = f" ({100 * value / ceiling:.0f}%)" if ceiling else ""
    return f"{value / unit:,.2f}{share}"
