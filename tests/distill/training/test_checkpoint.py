"""Checkpoints: exact, atomic, pruned; damaged ones are named and passed over; a full disk loses nothing."""

import errno
import json
import os
import random
import subprocess
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from distill.atomic import is_disk_full, whole_folder
from distill.errors import UserError
from distill.training import checkpoint


def state(value: float, size: int = 8) -> dict:
    return {
        "weights": {"w": torch.full((size,), float(value))},
        "rng": checkpoint.rng_state(),
        "loop": {"value": value},
    }


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_saved_is_loaded(tmp_path):
    assert checkpoint.newest(tmp_path / "none yet") is None
    saved = state(1.5)
    path = checkpoint.save(tmp_path, 7, saved, keep=2)
    found = checkpoint.newest(tmp_path)
    assert (found.folder, found.step) == (path, 7)
    assert torch.equal(found.state["weights"]["w"], saved["weights"]["w"])
    assert found.state["loop"] == {"value": 1.5}
    assert found.state["rng"]["python"] == saved["rng"]["python"]


def test_the_newest_few_are_kept(tmp_path):
    for step in (1, 5, 10, 11):
        checkpoint.save(tmp_path, step, state(step), keep=2)
    assert steps(tmp_path) == ["step-00000010", "step-00000011"]
    assert checkpoint.newest(tmp_path).step == 11


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_generators_go_on_where_they_were(tmp_path):
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    np.random.randn()
    checkpoint.save(tmp_path, 1, state(0), keep=1)
    expected = draws(), np.random.randn()
    draws()
    checkpoint.set_rng_state(checkpoint.newest(tmp_path).state["rng"])
    assert (draws(), np.random.randn()) == expected


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "edited": (lambda at: flip_last_byte(at / "weights.pt"), r"weights\.pt was changed"),
    "cut short": (lambda at: os.truncate(at / "weights.pt", 10), r"weights\.pt has 10 bytes instead of"),
    "file missing": (lambda at: (at / "rng.pt").unlink(), r"rng\.pt is missing"),
    "no manifest": (lambda at: (at / "manifest.json").unlink(), r"manifest\.json is missing"),
    "empty manifest": (lambda at: (at / "manifest.json").write_text(""), r"manifest\.json is not the manifest"),
    "foreign manifest": (lambda at: (at / "manifest.json").write_text("[1]"), r"manifest\.json is not the manifest"),
    "other step": (lambda at: at.rename(at.with_name("step-00000099")), r"manifest\.json is of another step"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_is_named_and_the_one_before_is_used(tmp_path, damage):
    for step in (1, 2):
        path = checkpoint.save(tmp_path, step, state(step), keep=2)
    harm, message = DAMAGES[damage]
    harm(path)
    with pytest.warns(UserWarning, match="skipped a damaged checkpoint: .*" + message):
        found = checkpoint.newest(tmp_path)
    assert (found.step, found.state["loop"]) == (1, {"value": 1})


def test_with_every_checkpoint_damaged_each_is_named(tmp_path):
    for step in (1, 2):
        flip_last_byte(checkpoint.save(tmp_path, step, state(step), keep=2) / "loop.pt")
    with pytest.warns(UserWarning, match="damaged checkpoint") as warned:
        assert checkpoint.newest(tmp_path) is None
    assert [("step-00000002" in str(w.message), "step-00000001" in str(w.message)) for w in warned] == [
        (True, False),
        (False, True),
    ]


def test_a_damaged_checkpoint_never_costs_an_intact_one(tmp_path):
    """Continuing from 2 past a damaged 9: saving 3 must not count 9 among those to keep."""
    checkpoint.save(tmp_path, 2, state(2), keep=3)
    flip_last_byte(checkpoint.save(tmp_path, 9, state(9), keep=3) / "loop.pt")
    checkpoint.save(tmp_path, 3, state(3), keep=2)
    assert steps(tmp_path) == ["step-00000002", "step-00000003"]


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(tmp_path):
    flip_last_byte(checkpoint.save(tmp_path, 4, state(0), keep=1) / "loop.pt")
    checkpoint.save(tmp_path, 4, state(8), keep=1)
    assert checkpoint.newest(tmp_path).state["loop"] == {"value": 8}


def test_leftovers_of_a_killed_save_are_removed(tmp_path):
    checkpoint.save(tmp_path, 1, state(1), keep=1)
    (tmp_path / ".step-00000002.partial").mkdir()
    (tmp_path / ".step-00000002.partial" / "weights.pt").write_text("half")
    assert checkpoint.newest(tmp_path).step == 1
    assert steps(tmp_path) == ["step-00000001"]


def test_loading_runs_no_code(tmp_path):
    """A checkpoint with anything but tensors and plain values is refused by torch, intact hash or not."""
    checkpoint.save(tmp_path, 1, {"weights": {"w": os.system}}, keep=1)
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        checkpoint.newest(tmp_path)


def test_frozen_weights_are_left_out_and_buffers_kept():
    student = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    student[0].weight.requires_grad_(False)
    weights = checkpoint.trained_weights(student)
    assert "0.weight" not in weights
    assert {"0.bias", "1.weight", "1.running_mean"} <= set(weights)
    other = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    other[0].weight.requires_grad_(False)
    checkpoint.load_weights(other, weights)
    assert torch.equal(other[0].bias, student[0].bias)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one MiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a small tmpfs needs root and the right to mount")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_full_disk_says_how_much_was_needed_and_loses_nothing(small_disk):
    checkpoint.save(small_disk / "checkpoints", 1, state(1), keep=2)
    before = (small_disk / "checkpoints/step-00000001/manifest.json").read_text()
    needed = 4 * 10**6
    with pytest.raises(UserError, match="the disk is full") as refused:
        checkpoint.save(small_disk / "checkpoints", 2, state(2, needed // 4), keep=1)
    said = int(str(refused.value).split("Writing it needs ")[1].split(" bytes")[0].replace(",", ""))
    assert needed < said < 1.05 * needed
    assert steps(small_disk / "checkpoints") == ["step-00000001"]
    assert (small_disk / "checkpoints/step-00000001/manifest.json").read_text() == before
    assert checkpoint.newest(small_disk / "checkpoints").state["loop"] == {"value": 1}


@pytest.mark.parametrize("failing_call", range(1, 7))
def test_a_disk_that_fills_at_any_flush_loses_nothing(tmp_path, monkeypatch, failing_call):
    """Three files, the manifest, the folder, and after the rename its parent."""
    checkpoint.save(tmp_path, 1, state(1), keep=1)
    calls = iter(range(1, 100))
    fsync = os.fsync

    def full(handle: int) -> None:
        if next(calls) == failing_call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="disk is full"):
        checkpoint.save(tmp_path, 2, state(2), keep=1)
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoint.newest(tmp_path).step == (1 if failing_call < 6 else 2)
    assert not [name for name in steps(tmp_path) if name.startswith(".")]


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
    path = checkpoint.save(tmp_path, 3, state(1), keep=1)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["step"] == 3
    assert set(manifest["files"]) == {"weights.pt", "rng.pt", "loop.pt"}
    assert all(manifest["files"][name]["bytes"] == (path / name).stat().st_size for name in manifest["files"])
