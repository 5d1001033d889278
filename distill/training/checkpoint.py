"""Checkpoints: one folder a step, complete or absent, checked by hash before it is believed.

    checkpoints/step-00000200/  weights.pt  optimizer.pt  rng.pt  loop.pt  manifest.json

The manifest holds the size and SHA-256 of every file and is written last.
"""

import hashlib
import json
import random
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from distill.atomic import settle_all, sha256_of, whole_folder

MANIFEST = "manifest.json"

State = Mapping[str, Any]
"""File stem -> what the file holds; tensors and plain Python values only, so that loading runs no code."""


class Checkpoint(NamedTuple):
    """A checkpoint that was read and found intact."""

    folder: Path
    step: int
    state: State


def save(folder: Path, step: int, state: State, keep: int) -> Path:
    """Write the checkpoint of ``step``, then remove all but the newest ``keep``.

    Raises:
        UserError: the disk is full; earlier checkpoints are untouched.
    """
    assert keep >= 1
    target = folder / f"step-{step:08d}"
    with whole_folder(target, needed=lambda: sum(_size(value) for value in state.values())) as partial:
        files = {f"{stem}.pt": _write(partial / f"{stem}.pt", value) for stem, value in state.items()}
        (partial / MANIFEST).write_text(json.dumps({"step": step, "files": files}, indent=1))
    listed = _listed(folder)
    # What is newer than the step just saved was damaged, or this run would have continued from it.
    kept = listed[: listed.index(target) + 1][-keep:]
    for path in set(listed) - set(kept):
        shutil.rmtree(path)
    return target


def newest(folder: Path) -> Checkpoint | None:
    """The newest intact checkpoint, on the CPU; damaged ones are named in a warning and skipped."""
    settle_all(folder)
    for path in reversed(_listed(folder)):
        damage = damage_of(path)
        if damage is None:
            step, files = _manifest(path)
            state = {Path(name).stem: torch.load(path / name, map_location="cpu", weights_only=True) for name in files}
            return Checkpoint(path, step, state)
        warnings.warn(f"skipped a damaged checkpoint: {damage}", stacklevel=2)
    return None


def newest_path(folder: Path) -> Path | None:
    """Where the newest checkpoint stands, unread."""
    return next(reversed(_listed(folder)), None)


def damage_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, beginning with the path of the file concerned; None if it is intact."""
    manifest = checkpoint / MANIFEST
    if not manifest.is_file():
        return f"{manifest} is missing"
    try:
        step, files = _manifest(checkpoint)
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{manifest} is not the manifest that was written"
    if checkpoint.name != f"step-{step:08d}":
        return f"{manifest} is of another step, {step}"
    for name, expected in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{path} has {path.stat().st_size:,} bytes instead of {expected['bytes']:,}"
        if sha256_of(path) != expected["sha256"]:
            return f"{path} was changed after it was written (its SHA-256 differs)"
    return None


def trained_weights(student: nn.Module) -> dict[str, Tensor]:
    """What training can change: parameters that require a gradient, and persistent buffers."""
    frozen = {
        name for name, parameter in student.named_parameters(remove_duplicate=False) if not parameter.requires_grad
    }
    return {name: tensor for name, tensor in student.state_dict().items() if name not in frozen}


def load_weights(student: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put back what ``trained_weights`` gave; the names must be those of this student."""
    assert weights.keys() == trained_weights(student).keys(), "a checkpoint of other weights"
    student.load_state_dict(weights, strict=False)


def rng_state() -> dict[str, Any]:
    """The state of every global generator: Python, NumPy, torch on the CPU and on each CUDA device."""
    numpy = np.random.get_state(legacy=False)
    return {
        "python": random.getstate(),
        "numpy": numpy | {"state": {**numpy["state"], "key": numpy["state"]["key"].tolist()}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put the generators back to where ``rng_state`` found them."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


class _HashingFile:
    """Just enough of a file for torch.save: hashes and counts what passes on its way to ``target``, or nowhere."""

    def __init__(self, target: IO[bytes] | None = None) -> None:
        self.sha256 = hashlib.sha256()
        self.bytes = 0
        self._target = target

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        self.bytes += memoryview(data).nbytes
        return self._target.write(data) if self._target else memoryview(data).nbytes

    def flush(self) -> None:
        """torch.save may call it; the target is flushed when it is closed."""


def _write(path: Path, value: Any) -> dict[str, Any]:
    """Save ``value`` and return what the manifest says of it."""
    with path.open("wb") as file:
        hashing = _HashingFile(file)
        torch.save(value, cast(IO[bytes], hashing))
    return {"bytes": hashing.bytes, "sha256": hashing.sha256.hexdigest()}


def _size(value: Any) -> int:
    """How many bytes ``value`` takes in a file."""
    counting = _HashingFile()
    torch.save(value, cast(IO[bytes], counting))
    return counting.bytes


def _listed(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-????????"))


def _manifest(checkpoint: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    files = {name: {"bytes": file["bytes"], "sha256": file["sha256"]} for name, file in manifest["files"].items()}
    return int(manifest["step"]), files
