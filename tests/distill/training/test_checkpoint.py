"""Checkpoints: exact, atomic, pruned; damaged ones are named and passed over; a full disk loses nothing."""

import errno
import json
import os
import random
import subprocess
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import CADENCE, Student, groups_of, run
from torch import nn

from distill.atomic import is_disk_full, sha256_of, whole_folder
from distill.engines import training_state
from distill.engines.plain import PlainEngine
from distill.errors import UserError
from distill.training import checkpoint


def save(folder: Path, step: int, value: float, **settings: Any) -> Path:
    """A checkpoint whose one weight and one number are ``value``, written by a real engine."""
    student = nn.Module()
    student.w = nn.Parameter(torch.full((8,), float(value)))
    engine = PlainEngine(student, [{"params": [student.w]}])
    return checkpoint.save(folder, step, engine.save, {"value": value}, **{"keep": 2} | settings)


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_saved_is_loaded(tmp_path):
    assert checkpoint.newest(tmp_path / "none yet") is None
    generators = checkpoint.rng_state()
    path = save(tmp_path, 7, 1.5)
    random.random(), torch.rand(())
    found = checkpoint.newest(tmp_path)
    assert (found.folder, found.step) == (path, 7)
    assert torch.equal(training_state.read_weights(found.folder / "state")["w"], torch.full((8,), 1.5))
    assert found.loop == {"value": 1.5}
    checkpoint.restore_rng(found.folder)
    assert checkpoint.rng_state()["python"] == generators["python"]
    assert torch.equal(checkpoint.rng_state()["torch"], generators["torch"])


@pytest.mark.parametrize("keep", [1, 2, 3, 4, 5, 9])
def test_the_newest_few_are_kept(tmp_path, keep):
    saved = (1, 5, 10, 11, 20)
    for step in saved:
        save(tmp_path, step, step, keep=keep)
    assert steps(tmp_path) == [f"step-{step:08d}" for step in saved[-keep:]]
    assert checkpoint.newest(tmp_path).step == 20


def test_the_best_is_kept_however_old(tmp_path):
    for step, best in ((1, None), (2, 1), (3, 1), (4, 1), (5, 4), (6, 4)):
        save(tmp_path, step, step, keep=1, best=best)
        assert steps(tmp_path) == [f"step-{kept:08d}" for kept in sorted({best or step, step})]
    assert checkpoint.newest(tmp_path).step == 6


def test_pruning_leaves_what_is_asked_for(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, step, keep=9)
    checkpoint.prune(tmp_path, 1, {2, None, 77})
    assert steps(tmp_path) == ["step-00000002", "step-00000004"]
    checkpoint.prune(tmp_path, 0, {None})
    assert steps(tmp_path) == []


def test_the_one_before(tmp_path):
    first, second, third = (save(tmp_path, step, step, keep=9) for step in (5, 40, 300))
    assert checkpoint.newest_path(tmp_path) == third
    assert [checkpoint.before(path) for path in (third, second, first)] == [second, first, None]


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_generators_go_on_where_they_were(tmp_path):
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    np.random.randn()
    path = save(tmp_path, 1, 0)
    expected = draws(), np.random.randn()
    draws()
    checkpoint.restore_rng(path)
    assert (draws(), np.random.randn()) == expected


def test_a_process_that_was_not_there_keeps_its_generators(tmp_path):
    path = save(tmp_path, 1, 0)
    (path / "rng-00000.pt").rename(path / "rng-00001.pt")
    random.seed(5)
    expected = random.Random(5).random()
    checkpoint.restore_rng(path)
    assert random.random() == expected


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


WEIGHTS = "state/__0_0.distcp"  # as torch names the file of the first process

DAMAGES = {
    "edited": (lambda at: flip_last_byte(at / WEIGHTS), rf"{WEIGHTS} was changed"),
    "cut short": (lambda at: os.truncate(at / WEIGHTS, 10), rf"{WEIGHTS} has 10 bytes instead of"),
    "weights missing": (lambda at: (at / WEIGHTS).unlink(), rf"{WEIGHTS} is missing"),
    "their index edited": (lambda at: flip_last_byte(at / "state/.metadata"), r"state/\.metadata was changed"),
    "file missing": (lambda at: (at / "rng-00000.pt").unlink(), r"rng-00000\.pt is missing"),
    "no manifest": (lambda at: (at / "manifest.json").unlink(), r"manifest\.json is missing"),
    "empty manifest": (lambda at: (at / "manifest.json").write_text(""), r"manifest\.json is not the manifest"),
    "foreign manifest": (lambda at: (at / "manifest.json").write_text("[1]"), r"manifest\.json is not the manifest"),
    "other step": (lambda at: at.rename(at.with_name("step-00000099")), r"manifest\.json is of another step"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_is_named_and_the_one_before_is_used(tmp_path, damage):
    for step in (1, 2):
        path = save(tmp_path, step, step)
    harm, message = DAMAGES[damage]
    harm(path)
    with pytest.warns(UserWarning, match=f"refused a damaged checkpoint: .*{message}.*; trying the one before it"):
        found = checkpoint.newest(tmp_path)
    assert (found.step, found.loop) == (1, {"value": 1})


def test_with_every_checkpoint_damaged_each_is_named(tmp_path):
    for step in (1, 2):
        flip_last_byte(save(tmp_path, step, step) / "loop.json")
    with pytest.warns(UserWarning, match="damaged checkpoint") as warned:
        assert checkpoint.newest(tmp_path) is None
    assert [("step-00000002" in str(w.message), "step-00000001" in str(w.message)) for w in warned] == [
        (True, False),
        (False, True),
    ]


def test_a_damaged_checkpoint_never_costs_an_intact_one(tmp_path):
    """Continuing from 2 past a damaged 9: saving 3 must not count 9 among those to keep."""
    save(tmp_path, 2, 2, keep=3)
    flip_last_byte(save(tmp_path, 9, 9, keep=3) / "loop.json")
    save(tmp_path, 3, 3, keep=2)
    assert steps(tmp_path) == ["step-00000002", "step-00000003"]


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(tmp_path):
    flip_last_byte(save(tmp_path, 4, 0, keep=1) / "loop.json")
    save(tmp_path, 4, 8, keep=1)
    assert checkpoint.newest(tmp_path).loop == {"value": 8}


def test_leftovers_of_a_killed_save_are_removed(tmp_path):
    save(tmp_path, 1, 1, keep=1)
    (tmp_path / ".step-00000002.partial/state").mkdir(parents=True)
    (tmp_path / ".step-00000002.partial" / WEIGHTS).write_text("half")
    assert checkpoint.newest(tmp_path).step == 1
    assert steps(tmp_path) == ["step-00000001"]


def test_loading_runs_no_code(tmp_path, monkeypatch):
    """Generators in anything but tensors and plain values are refused by torch, intact hash or not."""
    monkeypatch.setattr(checkpoint, "rng_state", lambda: {"python": os.system})
    path = save(tmp_path, 1, 0)
    assert checkpoint.damage_of(path) is None
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        checkpoint.restore_rng(path)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of two MiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(mount)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a small tmpfs needs root and the right to mount")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def bytes_of(checkpoint: Path) -> int:
    return sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())


def test_a_full_disk_says_how_much_was_needed_and_loses_nothing(small_disk):
    """The second checkpoint of a run does not fit beside the first."""
    with pytest.raises(UserError, match="checkpoints/step-00000008: the disk is full") as refused:
        run(small_disk, student=Student(width=250), cadence=replace(CADENCE, keep_checkpoints=1))
    said = int(str(refused.value).split("Writing it needs ")[1].split(" bytes")[0].replace(",", ""))
    assert steps(small_disk / "checkpoints") == ["step-00000004"]
    found = checkpoint.newest(small_disk / "checkpoints")
    assert said == pytest.approx(bytes_of(found.folder), rel=0.05)
    student = Student(width=250)
    PlainEngine(student, groups_of(student)).load(found.folder / "state")


@pytest.fixture
def flushed(monkeypatch) -> list[int]:
    """The inodes of all that is flushed to disk, in order."""
    seen: list[int] = []
    fsync = os.fsync

    def counted(handle: int) -> None:
        seen.append(os.fstat(handle).st_ino)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", counted)
    return seen


def test_every_file_and_folder_is_flushed(tmp_path, flushed):
    path = save(tmp_path, 1, 1)
    written = [*path.rglob("*"), path, tmp_path]
    assert {path.stat().st_ino for path in written} <= set(flushed)
    assert flushed[-1] == tmp_path.stat().st_ino  # after the rename


def test_a_disk_that_fills_at_any_flush_loses_nothing(tmp_path, monkeypatch, flushed):
    """The last flush is that of the parent, after the rename."""
    save(tmp_path / "none", 1, 1)
    flushes, fsync = len(flushed), os.fsync
    assert flushes >= 8  # state with two files, generators, loop, manifest, the folder, its parent

    for failing in range(1, flushes + 1):
        folder = tmp_path / str(failing)
        save(folder, 1, 1, keep=1)
        calls = iter(range(1, 100))

        def full(handle: int, calls=calls, failing=failing) -> None:
            if next(calls) == failing:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(handle)

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="step-00000002: the disk is full"):
            save(folder, 2, 2, keep=1)
        monkeypatch.setattr(os, "fsync", fsync)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert checkpoint.newest(folder).step == (1 if failing < flushes else 2)
        assert not [name for name in steps(folder) if name.startswith(".")]


def test_only_a_full_disk_is_called_a_full_disk(tmp_path):
    assert is_disk_full(OSError(errno.EDQUOT, "quota"))
    assert is_disk_full(RuntimeError("I/O error: No space left on device (os error 28)"))
    assert not is_disk_full(PermissionError(errno.EACCES, "no"))
    with pytest.raises(PermissionError), whole_folder(tmp_path / "x"):
        raise PermissionError(errno.EACCES, "no")
    assert steps(tmp_path) == []


def test_a_folder_is_replaced_only_by_a_whole_one(tmp_path):
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / "old").touch()
    with pytest.raises(KeyboardInterrupt), whole_folder(folder) as partial:  # noqa: PT012
        (partial / "new").touch()
        raise KeyboardInterrupt
    assert steps(folder) == ["old"]
    with whole_folder(folder) as partial:
        (partial / "new").touch()
    assert steps(folder) == ["new"]
    assert steps(tmp_path) == ["x"]


def test_the_manifest_lists_every_file(tmp_path):
    path = save(tmp_path, 3, 1, keep=1)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["step"] == 3
    assert set(manifest["files"]) == {WEIGHTS, "state/.metadata", "rng-00000.pt", "loop.json"}
    for name, told in manifest["files"].items():
        assert told == {"bytes": (path / name).stat().st_size, "sha256": sha256_of(path / name)}
