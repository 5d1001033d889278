"""Parity and speed on one GPU, in one call: `bash scripts/gpu_check.sh`, which says what it needs.

First whether every kernel, loss and stage computes on this device what its reference does (`scripts.gpu_parity`), then
how fast the benchmarks run beside what the device reaches (`scripts.ceilings`). Every section is a process of its own,
since a kernel that goes wrong takes its process's device down with it, and is ended when its time or everybody's is
up; the others go on. What comes out is a page of Markdown. Exit code 1 if parity failed or could not be established.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from scripts.gpu_report import page
from scripts.gpu_sections import BENCHMARKS, PARITY, Section


@dataclass(frozen=True)
class Outcome:
    """How a section ended.

    Attributes:
        section: its name.
        said: "done", or why not.
        failed: it did not end well; one that was left out did not fail.
        seconds: it took.
        figures: what it wrote down, if anything.
    """

    section: str
    said: str
    failed: bool
    seconds: float
    figures: dict[str, Any] | None


@dataclass(frozen=True)
class Check:
    """What all sections share."""

    device: str
    dtype: str
    small: bool
    place: Path
    ends_at: float

    def run(self, section: Section) -> Outcome:
        """A section in its own process; what it printed is shown where it failed."""
        if self.small and section.small is None:
            return Outcome(section.name, "left out: no small form", False, 0.0, None)
        if section.module == "pytest" and not (find_spec("pytest") and find_spec("xdist")):
            return Outcome(section.name, "left out: pytest or pytest-xdist is not installed", False, 0.0, None)
        left = min(section.seconds * (4 if self.small else 1), self.ends_at - time.monotonic())
        if left < 5:
            return Outcome(section.name, "no time was left", True, 0.0, None)
        file = self.place / f"{''.join(c if c.isalnum() else '-' for c in section.name)}.json"
        started = time.monotonic()
        said, text = self._said(self._command(section, file), left)
        took = time.monotonic() - started
        # At once, as sections may run side by side. Tables in full; of what failed the end, where the reason stands.
        print(f"== {section.name}\n{text if said == 'done' else text[-4000:]}\n   {said}, {took:.0f} s", flush=True)
        return Outcome(
            section.name, said, said != "done", took, json.loads(file.read_text()) if file.exists() else None
        )

    def _command(self, section: Section, file: Path) -> list[str]:
        options = shlex.split((section.small if self.small else section.real) or "")
        if section.module != "pytest":
            options += ["--device", self.device]
        if section.typed:
            options += ["--dtype", self.dtype]
        if section.output:
            options += ["--output", str(file)]
        return [sys.executable, "-m", section.module, *options]

    def _said(self, command: list[str], limit: float) -> tuple[str, str]:
        """How it ended, and all that it printed."""
        with tempfile.TemporaryFile("w+", dir=self.place) as said:
            # A session of its own: what a section starts ends with it.
            process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                code = process.wait(limit)
                ended = "done" if code == 0 else f"failed with code {code}"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                ended = f"ended after its {limit:.0f} s"
            said.seek(0)
            return ended, said.read()


def main(
    device: Annotated[str, typer.Option(help="cuda, or cpu to try this program.")] = "cuda",
    small: Annotated[bool, typer.Option("--small", help="Tiny sizes: the timings mean nothing.")] = False,
    folder: Annotated[Path, typer.Option(help="Gets the page, named after the device.")] = Path("docs/benchmarks"),
    minutes: Annotated[float, typer.Option(help="After which no section runs any more.")] = 14.0,
    only: Annotated[
        list[str] | None, typer.Option(help="Sections by name, `programs` or `scan 1B`; all if not given.")
    ] = None,
) -> None:
    """Check and measure everything, and write the page."""
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: torch finds no CUDA device here (--device cpu --small tries the program without one)")
    names = [section.name for section in (*PARITY, *BENCHMARKS)]
    if unknown := set(only or ()) - set(names):
        raise typer.BadParameter(f"--only {', '.join(sorted(unknown))}: allowed are {', '.join(names)}")
    dtype = "bfloat16" if device == "cuda" else "float32"
    with tempfile.TemporaryDirectory() as place:
        check = Check(device, dtype, small, Path(place), time.monotonic() + 60 * minutes)
        with ThreadPoolExecutor(len(PARITY)) as together:  # no time is measured there
            parity = list(together.map(check.run, _chosen(PARITY, only)))
        benchmarks = [check.run(section) for section in _chosen(BENCHMARKS, only)]
    ended = [(each.section, each.said, each.seconds) for each in parity + benchmarks]
    figures = {each.section: each.figures for each in parity + benchmarks if each.figures}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{_name(device)}{'-small' if small else ''}.md"
    path.write_text(page(device, dtype, small, ended, figures))
    wrong = [each for each in parity if each.failed]
    unmeasured = [each.section for each in benchmarks if each.failed]
    print(f"wrote {path}" + (f"; without {', '.join(unmeasured)}" if unmeasured else ""))
    for each in wrong:
        print(f"parity is not established: {each.section} {each.said}", file=sys.stderr)
    raise typer.Exit(int(bool(wrong)))


def _chosen(sections: Sequence[Section], only: Sequence[str] | None) -> list[Section]:
    return [section for section in sections if not only or section.name in only]


def _name(device: str) -> str:
    """Of the file: "nvidia-h100-80gb-hbm3", or "cpu"."""
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return "-".join(name.lower().replace("/", " ").split())


if __name__ == "__main__":
    typer.run(main)
