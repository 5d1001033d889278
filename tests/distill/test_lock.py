"""Whoever works in a folder is alone there, from before it is made, and leaves nothing of that behind."""

import fcntl
import os
import signal
import time
from pathlib import Path

import pytest

from distill.errors import UserError
from distill.lock import LOCK, alone_in


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "runs" / "mine"


def require_held(folder: Path) -> None:
    with pytest.raises(UserError, match=f"another run is at work in {folder}"), alone_in(folder):
        pass


def require_free(folder: Path) -> None:
    with alone_in(folder):
        require_held(folder)


@pytest.mark.parametrize("is_there", [True, False])
def test_one_at_a_time(folder, is_there):
    if is_there:
        folder.mkdir(parents=True)
    with alone_in(folder):
        require_held(folder)
        require_held(folder)  # the one that was refused let nothing go
    require_free(folder)
    assert folder.exists() == is_there


def test_what_nothing_was_put_into_goes_again(folder, tmp_path):
    with pytest.raises(UserError, match="wrong recipe"), alone_in(folder):
        raise UserError("wrong recipe")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "runs").mkdir()
    with alone_in(folder):
        pass
    assert list(tmp_path.rglob("*")) == [tmp_path / "runs"]
    with alone_in(folder):
        (folder / "data").touch()
    assert list(folder.iterdir()) == [folder / "data"]


def test_a_killed_process_holds_nobody_up(folder):
    child = os.fork()
    if child == 0:
        with alone_in(folder):
            (folder / "data").touch()
            time.sleep(60)
            os._exit(1)
    while not (folder / "data").exists():
        time.sleep(0.001)
    require_held(folder)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert (folder / LOCK).exists()
    require_free(folder)
    assert list(folder.iterdir()) == [folder / "data"]


@pytest.mark.parametrize("taken", ["the file", "the folder", "the folder, before the file was made"])
def test_what_a_run_that_ends_takes_away_is_made_anew(folder, monkeypatch, taken):
    """It ends between our opening the file and our locking it, or our making the folder and opening the file."""
    flock, opened, ends = fcntl.flock, os.open, iter([True])

    def end() -> None:
        if next(ends, False):
            (folder / LOCK).unlink(missing_ok=True)
            if taken != "the file":
                folder.rmdir()

    def late_flock(handle: int, how: int) -> None:
        if "before" not in taken:
            end()
        flock(handle, how)

    def late_open(path: Path, *how: int) -> int:
        if "before" in taken and Path(path).name == LOCK:
            end()
        return opened(path, *how)

    monkeypatch.setattr(fcntl, "flock", late_flock)
    monkeypatch.setattr(os, "open", late_open)
    with alone_in(folder):
        monkeypatch.undo()
        assert next(ends, None) is None
        require_held(folder)
    assert not folder.exists()


def test_a_file_system_without_locks_refuses_nobody(folder, monkeypatch):
    def unknown(_handle: int, _how: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unknown)
    with alone_in(folder), alone_in(folder):
        assert (folder / LOCK).exists()
