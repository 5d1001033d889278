"""A folder that is replaced is the old one or the new one, whenever the process is killed. Real processes."""

import os
import signal
import sys
from pathlib import Path

import pytest

from distill.atomic import settle, settle_all, whole_folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder to be replaced: of two files, so that it can be half there."""
    folder = tmp_path / "stage"
    folder.mkdir()
    for name in ("old-1", "old-2"):
        (folder / name).touch()
    return folder


def replace(folder: Path) -> None:
    with whole_folder(folder) as partial:
        for name in ("new-1", "new-2"):
            (partial / name).touch()


def killed_at(operation: int, folder: Path) -> bool:
    """Replace the folder in a process that kills itself just before its nth operation on files; whether it did."""
    child = os.fork()
    if child == 0:
        seen = 0

        def count(event: str, _arguments: tuple) -> None:
            nonlocal seen
            if event == "open" or event.startswith(("os.", "shutil.")):
                seen += 1
                if seen == operation:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        replace(folder)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_killed_at_every_step(folder):
    old, new = ["old-1", "old-2"], ["new-1", "new-2"]
    outcomes, operation = [], 1
    while killed_at(operation, folder):
        settle(folder)
        outcomes.append(names(folder))
        assert outcomes[-1] in (old, new), operation
        if outcomes[-1] == new:  # for the next kill, let it be as it was
            for path in folder.iterdir():
                path.rename(path.with_name(path.name.replace("new", "old")))
        operation += 1
    assert names(folder.parent) == ["stage"]
    assert names(folder) == new
    until_then = outcomes.index(new)
    assert until_then > 0
    assert outcomes == [old] * until_then + [new] * (len(outcomes) - until_then)


def test_between_the_two_renames_the_old_one_is_put_back(folder):
    folder.rename(folder.with_name(".stage.replaced"))
    folder.with_name(".stage.partial").mkdir()
    settle(folder)
    assert names(folder) == ["old-1", "old-2"]
    replace(folder)
    assert names(folder) == ["new-1", "new-2"]
    assert names(folder.parent) == ["stage"]


def test_all_that_was_left_is_seen_to(folder):
    folder.rename(folder.with_name(".stage.replaced"))
    for name in (".other.partial", "done", ".done.replaced"):
        folder.with_name(name).mkdir()
    settle_all(folder.parent)
    assert names(folder.parent) == ["done", "stage"]


def test_what_fails_to_take_its_place_costs_nothing(folder, monkeypatch):
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path.name.endswith(".partial"):
            raise PermissionError(13, "no")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(PermissionError):
        replace(folder)
    assert names(folder) == ["old-1", "old-2"]
    assert names(folder.parent) == ["stage"]


def test_a_link_gives_way_and_what_it_leads_to_stays(folder):
    link = folder.with_name("data")
    link.symlink_to(folder)
    replace(link)
    assert names(link) == ["new-1", "new-2"]
    assert not link.is_symlink()
    assert names(folder) == ["old-1", "old-2"]
    assert names(folder.parent) == ["data", "stage"]


@pytest.mark.parametrize("leads_to", ["stage", "nowhere"])
def test_a_link_that_was_left_behind_goes(folder, leads_to):
    folder.with_name(".stage.replaced").symlink_to(folder.with_name(leads_to))
    settle(folder)
    assert names(folder) == ["old-1", "old-2"]
    assert names(folder.parent) == ["stage"]
