"""What a run says of itself: metrics.jsonl always, TensorBoard when asked.

One JSON object a line, in the order of events:

    {"kind": "train", "step": 7, "tokens": 28672, "loss": 1.93, "lr": 0.001, "grad_norm": 0.4,
     "tokens_per_second": 5e3, "cpu_seconds": 0.8}
    {"kind": "eval", "step": 7, "tokens": 28672, ...what evaluate() returned}

``step`` counts finished optimizer steps, so the evaluation before training has step 0. ``cpu_seconds`` are this
process's in the step, over all its threads: on a busy machine they still say what a step costs.
"""

import importlib
import itertools
import json
import math
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from distill.atomic import explained_full_disk, flush_to_disk, replace_file
from distill.errors import UserError

TRACKERS = ("tensorboard",)


class MetricsLog:
    """Appends to ``folder/metrics.jsonl``, after cutting what an interrupted run wrote beyond ``step``.

    So the file always reads as if the run had never been interrupted. A context manager.

    Args:
        folder: where metrics.jsonl (and tensorboard/) stand.
        trackers: see ``require_trackers``.
        step: the step the run continues from; 0 for a new one.
    """

    def __init__(self, folder: Path, trackers: Collection[str], step: int) -> None:
        require_trackers(trackers)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        with explained_full_disk(self.path):
            _cut(self.path, step)
        self._file = self.path.open("a", encoding="utf-8")
        self._board = _tensorboard(folder / "tensorboard", step) if "tensorboard" in trackers else None

    def write(self, kind: str, step: int, tokens: int, values: Mapping[str, Any]) -> None:
        """Add one line and hand it to the operating system, so that a killed process has not lost it.

        Raises:
            UserError: the disk is full.
        """
        record = {"kind": kind, "step": step, "tokens": tokens, **values}
        with explained_full_disk(self.path):
            # JSON has no infinities and no NaN.
            self._file.write(json.dumps(_finite(record), allow_nan=False) + "\n")
            self._file.flush()
            if self._board is not None:
                for name, value in values.items():
                    if isinstance(value, int | float):
                        self._board.add_scalar(f"{kind}/{name}", value, step)

    def flush_to_disk(self) -> None:
        """Return when every line would survive a power cut; called before a checkpoint relies on them."""
        flush_to_disk(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


class NoLog(nullcontext):
    """What the processes that do not write have in the place of a ``MetricsLog``."""

    def __init__(self) -> None:
        super().__init__(self)

    def write(self, kind: str, step: int, tokens: int, values: Mapping[str, Any]) -> None:
        """The main process writes."""

    def flush_to_disk(self) -> None:
        """There is nothing to flush."""


def require_trackers(trackers: Collection[str]) -> None:
    """Refuse unknown trackers, and known ones that are not installed, before anything is computed.

    Raises:
        UserError: names what is allowed, or the command that installs it.
    """
    for name in trackers:
        if name not in TRACKERS:
            raise UserError(f"tracker {name!r} is unknown; allowed: {', '.join(TRACKERS)} (or none)")
        try:
            importlib.import_module("torch.utils.tensorboard")
        except ImportError as error:
            raise UserError(
                f"tracker {name!r} is not installed ({error}): pip install 'distill-ssm[{name}]',"
                " or remove it from trackers"
            ) from error


def _tensorboard(folder: Path, step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=step + 1)


def _cut(path: Path, step: int) -> None:
    """Drop what comes after ``step``, what a killed process left half-written, and the evaluation at ``step``.

    A run evaluates after it saved, so one that continues from ``step`` evaluates there again.
    """
    lines = path.read_text(errors="replace").splitlines(keepends=True) if path.is_file() else []
    kept = "".join(itertools.takewhile(lambda line: _is_before(line, step), lines))
    replace_file(path, kept.encode())


def _is_before(line: str, step: int) -> bool:
    """Whether a run that continues from ``step`` will not write this line again."""
    try:
        record = json.loads(line)
    except ValueError:
        return False
    last = step if record["kind"] == "train" else step - 1
    return line.endswith("\n") and record["step"] <= last


def _finite(value: Any) -> Any:
    """``value`` with null where a number is infinite or NaN."""
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
