"""Checkpoints: one folder a step, complete or absent, checked by hash before it is believed.

    checkpoints/step-00000200/
      state/           what training changes, as the engine writes it: in shards where it shards
      rng-00000.pt     the generators of process 0, and so on
      loop.json        how far the run was, and with which settings
      manifest.json    size and SHA-256 of every file; written last

Every process writes and hashes its part; the folder, which all must see, gets its name when all are done. On a network
file system what one process wrote may show on another machine a while later. So nothing is decided by one view alone:
a file is hashed by a process that sees it, and what the main process sees the others wait for.
"""

import json
import random
import re
import shutil
import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from distill.atomic import explained_full_disk, partial_of, settle_all, sha256_of, whole_folder
from distill.engines import processes

MANIFEST, STATE, LOOP = "manifest.json", "state", "loop.json"
VIEW = 120.0
"""Seconds after which a file that another process sees is missing here; NFS clients look again within 60."""


class Checkpoint(NamedTuple):
    """A checkpoint that was found intact."""

    folder: Path
    step: int
    loop: dict[str, Any]


def save(
    folder: Path,
    step: int,
    write_state: Callable[[Path], None],
    loop: Mapping[str, Any],
    *,
    keep: int,
    best: int | None = None,
    needed: Callable[[], int] | None = None,
) -> Path:
    """Write the checkpoint of ``step``; then all but the newest ``keep`` and the ``best`` go. Every process calls it.

    Args:
        folder: of all checkpoints; on storage that every process sees.
        step: finished steps.
        write_state: writes a process's part into the folder it is given.
        loop: plain data.
        keep: how many stay, this one included.
        best: a step whose checkpoint stays however old it is.
        needed: bytes, for the message when the disk is full.

    Raises:
        UserError: the disk is full; earlier checkpoints are untouched.
    """
    assert keep >= 1
    target = of_step(folder, step)
    partial = partial_of(target)

    def write_beside() -> None:
        if processes.is_main():
            (partial / LOOP).write_text(json.dumps(loop, indent=1))
        torch.save(rng_state(), partial / _rng_file())

    with ExitStack() as whole:
        # One after another, each by all or none: a process that cannot write must not leave others waiting in the next.
        _together(target, needed, lambda: whole.enter_context(_main_folder(target, needed)))
        _together(target, needed, write_beside)
        _together(target, needed, lambda: write_state(partial / STATE))
        files = processes.gather(_hashed(partial))
        _together(target, needed, lambda: _write_manifest(partial, step, files))
        processes.together(whole.close)
    if processes.is_main():
        prune(folder, keep, {best, step}, newest=step)
    processes.wait()
    return target


def prune(folder: Path, keep: int, also: Collection[int | None] = (), *, newest: int | None = None) -> None:
    """Remove all checkpoints but the last ``keep`` and those of the steps ``also``.

    What is newer than ``newest`` goes too: it was damaged, or the run would have continued from it.
    """
    listed = _listed(folder)
    usable = [path for path in listed if newest is None or _step_of(path) <= newest]
    kept = usable[max(0, len(usable) - keep) :] + [path for path in usable if _step_of(path) in also]
    for path in set(listed) - set(kept):
        shutil.rmtree(path)


def newest(folder: Path) -> Checkpoint | None:
    """The newest intact checkpoint; damaged ones are refused by name in a warning. All processes call it."""
    processes.on_main(lambda: settle_all(folder))
    for path in reversed(processes.on_main(lambda: _listed(folder))):
        damage = damage_of(path)
        if damage is None:
            return Checkpoint(path, _step_of(path), json.loads((path / LOOP).read_text()))
        if processes.is_main():
            warnings.warn(f"refused a damaged checkpoint: {damage}; trying the one before it", stacklevel=2)
    return None


def newest_path(folder: Path) -> Path | None:
    """Where the newest checkpoint stands, unread."""
    return next(reversed(_listed(folder)), None)


def of_step(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step stands."""
    return folder / f"step-{step:08d}"


def before(checkpoint: Path) -> Path | None:
    """The checkpoint before this one, unread."""
    return next((path for path in reversed(_listed(checkpoint.parent)) if path.name < checkpoint.name), None)


def damage_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, beginning with the path of the file concerned; None if it is intact.

    Processes that call it together share the hashing, and each sees to what it alone will read.
    """
    files, damage = processes.on_main(lambda: _files_of(checkpoint))
    if damage is not None:
        return damage
    own = {LOOP, _rng_file()} & files.keys()
    mine = sorted({*sorted(files)[processes.rank() :: processes.world()], *own})
    found = (damage for name in mine if (damage := _damage_of_file(checkpoint / name, files[name])))
    return next((damage for damage in processes.gather(next(found, None)) if damage), None)


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


def restore_rng(checkpoint: Path) -> None:
    """Put this process's generators back; a process that was not there keeps those it has."""
    path = checkpoint / _rng_file()
    if path.is_file():
        set_rng_state(torch.load(path, weights_only=True))


def _together(target: Path, needed: Callable[[], int] | None, write: Callable[[], object]) -> None:
    """``write()`` by every process; a full disk for one is a full disk for all."""

    def explained() -> None:
        with explained_full_disk(target, needed):
            write()

    processes.together(explained)


def _main_folder(target: Path, needed: Callable[[], int] | None) -> AbstractContextManager[object]:
    """The folder that all fill, which the main process makes and puts in place."""
    return whole_folder(target, needed) if processes.is_main() else nullcontext()


def _hashed(partial: Path) -> dict[str, dict[str, Any]]:
    """This process's share of the entries of the manifest: of every file that any process sees, one that it sees."""
    views = processes.gather({str(path.relative_to(partial)) for path in partial.rglob("*") if path.is_file()})
    entries = {}
    for index, name in enumerate(sorted(set().union(*views))):
        seers = [rank for rank, seen in enumerate(views) if name in seen]
        if seers[index % len(seers)] == processes.rank():
            entries[name] = {"sha256": sha256_of(partial / name), "bytes": (partial / name).stat().st_size}
    return entries


def _write_manifest(partial: Path, step: int, files: Sequence[dict[str, dict[str, Any]]]) -> None:
    if processes.is_main():
        merged = {name: entry for share in files for name, entry in share.items()}
        (partial / MANIFEST).write_text(json.dumps({"step": step, "files": merged}, indent=1))


def _files_of(checkpoint: Path) -> tuple[dict[str, dict[str, Any]], str | None]:
    """The files that a checkpoint's manifest lists, or what is wrong before a byte of them is read."""
    manifest = checkpoint / MANIFEST
    if not manifest.is_file():
        return {}, f"{manifest} is missing"
    try:
        step, files = _manifest(checkpoint)
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}, f"{manifest} is not the manifest that was written"
    if checkpoint.name != f"step-{step:08d}":
        return {}, f"{manifest} is of another step, {step}"
    missing = (checkpoint / name for name in sorted(files) if not (checkpoint / name).is_file())
    return files, next((f"{path} is missing" for path in missing), None)


def _damage_of_file(path: Path, expected: Mapping[str, Any]) -> str | None:
    if not _shows(path):
        return (
            f"{path} is there for the main process and not for process {processes.rank()}, after {VIEW:.0f} s: they do"
            " not share the storage"
        )
    if path.stat().st_size != expected["bytes"]:
        return f"{path} has {path.stat().st_size:,} bytes instead of {expected['bytes']:,}"
    if sha256_of(path) != expected["sha256"]:
        return f"{path} was changed after it was written (its SHA-256 differs)"
    return None


def _shows(path: Path) -> bool:
    """Whether this process sees a file that the main process sees, now or within ``VIEW``."""
    given_up = time.monotonic() + VIEW
    while not path.is_file():
        if time.monotonic() > given_up:
            return False
        time.sleep(0.05)
    return True


def _listed(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-????????"))


def _step_of(checkpoint: Path) -> int:
    found = re.fullmatch(r"step-(\d{8})", checkpoint.name)
    return int(found[1]) if found else -1


def _rng_file() -> str:
    return f"rng-{processes.rank():05d}.pt"


def _manifest(checkpoint: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    files = {name: {"bytes": file["bytes"], "sha256": file["sha256"]} for name, file in manifest["files"].items()}
    return int(manifest["step"]), files
