"""How benchmarks measure: alternating timings, peak memory in a fresh process, one JSON record, one table.

    seconds({"naive": f, "ours": g})     medians of calls that take turns (eval.timing)
    peak_memory(prepare, 2048, 1024)     bytes that the call which prepare(2048, 1024) returns adds at its worst moment
    record(path, {"rows": rows})         figures, with versions, machine, thread count and date beside them
    show("title", head, rows)            the same for eyes
    device_and_dtype("cpu", "float32")   torch's, of what was given on the command line

Figures of one run may be compared; those of different runs or machines only as ratios.
"""

import json
import os
import platform
import resource
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from distill.atomic import replace_file
from distill.errors import UserError
from distill.evaluation_record import json_numbers
from eval.timing import Call, circumstances, seconds, synchronize

__all__ = [
    "Call",
    "Fields",
    "circumstances",
    "device_and_dtype",
    "peak_memory",
    "record",
    "require_file",
    "require_one_of",
    "seconds",
    "show",
]

Fields = dict[str, Any]
DEVICES = ("cpu", "cuda")
DTYPES = ("float32", "bfloat16", "float16", "float64")


def device_and_dtype(device: str, dtype: str, dtypes: Sequence[str] = DTYPES) -> tuple[torch.device, torch.dtype]:
    """What --device and --dtype name.

    Args:
        dtypes: those that the program can measure in.

    Raises:
        UserError: there is no such device or dtype, or no GPU.
    """
    require_one_of("--device", device, DEVICES)
    require_one_of("--dtype", dtype, dtypes)
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is visible to this PyTorch; use cpu")
    return torch.device(device), getattr(torch, dtype)


def require_one_of(option: str, given: str, allowed: Sequence[str]) -> None:
    """Raises UserError, which names all that is allowed, where it was something else."""
    if given not in allowed:
        raise UserError(f"{option} is {given!r}; allowed are {', '.join(allowed[:-1])} and {allowed[-1]}")


def require_file(output: Path | None) -> None:
    """Raises UserError where figures would be written to a folder, before they are measured."""
    if output is not None and output.is_dir():
        raise UserError(f"--output {output} is a folder; name a file, such as {output / 'figures.json'}")


def peak_memory(prepare: Callable[..., Call], *arguments: Any, threads: int | None = None) -> int:
    """Bytes that a call holds at its worst moment beyond what was there before it.

    On a CPU the growth of resident memory in a fresh process; on CUDA that of the tensors allocated on the current
    device, in this process if it computes there already: tensors are counted, so nothing is left over to mislead.

    Args:
        prepare: a function at the top of a module; makes the inputs and returns the call to be measured.
        arguments: of ``prepare``; they must pickle.
        threads: torch's, in that process; its default if None.
    """
    if torch.cuda.is_initialized():
        return _growth(prepare, arguments, threads)
    # Else glibc would keep what was freed, and a peak would be that of the allocator and not of the tensors alive.
    with (
        _environment(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="0"),
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh,
    ):
        return fresh.submit(_growth, prepare, arguments, threads).result()


def record(path: Path, figures: Mapping[str, Any]) -> None:
    """Write figures as JSON, whole or not at all, with all that they depend on besides the code.

    What JSON has no number for is written as "nan" or "inf".

    Raises:
        UserError: the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    told = json_numbers({**figures, "measured_on": circumstances()})
    replace_file(path, f"{json.dumps(told, indent=1, ensure_ascii=False)}\n".encode())


def show(title: str, head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table; its first column is on the left, numbers are on the right."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for index, column in enumerate(head):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*map(str, row))
    Console().print(table)


def _growth(prepare: Callable[..., Call], arguments: Sequence[Any], threads: int | None) -> int:
    if threads:
        torch.set_num_threads(threads)
    call = prepare(*arguments)
    if torch.cuda.is_available() and torch.cuda.memory_allocated():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        synchronize()
        return torch.cuda.max_memory_allocated() - before
    _forget_high_water()
    before = _high_water()
    call()
    return _high_water() - before


def _forget_high_water() -> None:
    """Let the high-water mark start at what is resident now; where the kernel does not, it stays what it was."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _high_water() -> int:
    """The largest resident memory of this process so far, in bytes."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Inside, these variables are set, for the processes that are started there."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
