"""On the way to prepared data: killed anywhere, damaged, changed. The same call ends with the same bytes."""

import os
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from distill.data import pack, prepare, split_documents
from distill.data.parts import MadeFrom, open_parts
from distill.errors import UserError
from tests.distill.data.folders import files_of, journal_of, killed_at, n_parts, sealing, touching_files

BLOCK = 64


@pytest.fixture(scope="module")
def halves(library):
    return split_documents(library, fraction=0.3)


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch):
    monkeypatch.setattr(pack, "CHUNK_CHARACTERS", 5_000)
    monkeypatch.setattr(pack, "PART_CHARACTERS", 20_000)


@pytest.fixture
def make(halves, tokenizer, tmp_path) -> Callable[..., dict[str, bytes]]:
    """Prepare a folder; what it holds then. ``drop``: leave out so many documents."""

    def make(name: str = "data", *, drop: int = 0, **options) -> dict[str, bytes]:
        train, held_out = halves
        prepare(train[drop:], held_out, tokenizer, tmp_path / name, block=BLOCK, **options)
        return files_of(tmp_path / name)

    return make


@pytest.fixture
def undisturbed(make) -> dict[str, bytes]:
    return make("undisturbed")


@pytest.fixture
def stopped(make, tmp_path) -> Path:
    """A folder whose preparation was killed after its fourth part."""
    assert killed_at(5, sealing, make)
    assert n_parts(tmp_path / "data") == 4
    return tmp_path / "data"


@pytest.mark.parametrize("part", [1, 2, 6])
def test_what_a_kill_interrupts_goes_on_from_the_last_part(make, undisturbed, part, tmp_path, capfd):
    assert killed_at(part, sealing, make)
    assert not (tmp_path / "data").exists()
    assert n_parts(tmp_path / "data") == part - 1
    assert make() == undisturbed
    said = capfd.readouterr().err
    assert (f"in {part - 1} part(s)" in said) == (part > 1)
    assert not journal_of(tmp_path / "data").parent.exists()


def test_killed_again_and_again_it_ends_all_the_same(make, undisturbed, tmp_path):
    """Each process makes one part and dies in the next."""
    kills = 0
    while killed_at(2, sealing, make):
        kills += 1
        assert n_parts(tmp_path / "data") == kills
    assert kills >= 5
    assert files_of(tmp_path / "data") == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("stale", [False, True], ids=["new", "replaced"])
def test_a_kill_at_any_operation_on_files(make, undisturbed, stale, tmp_path):
    """What stands at the folder is the old, nothing, or the new; and the same call makes it the new."""
    folder = tmp_path / "place" / "data"
    old = make("old", drop=1)
    operation = int(stale) - 2
    is_over = False
    while not is_over:
        operation += 3  # the two runs of this test meet different ones
        shutil.rmtree(folder.parent, ignore_errors=True)
        if stale:
            make("place/data", drop=1)
        is_over = not killed_at(operation, touching_files, partial(make, "place/data"))
        found = files_of(folder) if folder.exists() else None
        assert found in (None, old if stale else None, undisturbed), operation
        assert make("place/data") == undisturbed, operation
        assert [path.name for path in folder.parent.iterdir()] == ["data"]
    assert operation > 50


def test_a_torn_line_of_the_journal_is_no_part(stopped, make, undisturbed, recwarn):
    journal = journal_of(stopped)
    journal.write_text(journal.read_text()[:-30])
    assert make() == undisturbed
    assert not [warning for warning in recwarn if warning.category is UserWarning]


@pytest.mark.parametrize("name", ["train.tokens", "train.starts"])
@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_a_damaged_part_is_named_and_made_again(stopped, make, undisturbed, name, damage, capfd):
    path = journal_of(stopped).parent / "data" / name
    whole = path.read_bytes()
    middle = len(whole) // 2
    if damage == "cut":
        path.write_bytes(whole[:middle])
    elif damage == "flip":
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    else:
        path.unlink()
    with pytest.warns(UserWarning, match=rf"{name}: part \d of 4 is damaged"):
        assert make() == undisturbed
    kept = capfd.readouterr().err
    assert ("going on" in kept) == (damage != "remove"), "what stands before the damage is used"


def test_a_damaged_journal_is_named(stopped, make, undisturbed):
    journal = journal_of(stopped)
    lines = journal.read_text().splitlines(keepends=True)
    lines[2] = lines[2].replace('"documents": ', '"documents": 1')
    journal.write_text("".join(lines))
    with pytest.warns(UserWarning, match=r"parts\.jsonl:3 is damaged"):
        assert make() == undisturbed


@pytest.mark.parametrize("change", [{"drop": 1}, {"eos": True}, {"bos": False}], ids=["text", "eos", "bos"])
def test_parts_of_something_else_are_not_used(stopped, make, change, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        changed = make(**change)
    assert changed == make("fresh", **change)
    said = capfd.readouterr().err
    assert (
        "4 of 4 part(s) are not used again, because they were made from another source or with other settings" in said
    )


def test_two_processes_do_not_prepare_the_same_folder(stopped, make, undisturbed):
    before = files_of(journal_of(stopped).parent / "data")
    with open_parts(stopped, MadeFrom("", []), 2):
        taken = files_of(journal_of(stopped).parent / "data")
        with pytest.raises(UserError, match="data: another process is preparing it"):
            make()
        assert files_of(journal_of(stopped).parent / "data") == taken
    assert before == taken
    assert make() == undisturbed


def test_a_disk_that_fills_up_keeps_whole_parts(make, undisturbed, small_disk, capfd):
    folder = small_disk / "run" / "data"
    filler = small_disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - 100_000))
    with pytest.raises(
        UserError, match=r"run/data: the disk is full\. .*free some space and run the same command again"
    ):
        make(folder)
    assert not folder.exists()
    n_kept = n_parts(folder)
    assert n_kept > 1
    filler.unlink()
    assert make(folder) == undisturbed
    assert f"in {n_kept} part(s)" in capfd.readouterr().err


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(mount)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a small tmpfs needs root and the right to mount")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_what_a_kill_left_beside_a_finished_folder_goes(make, undisturbed, tmp_path):
    make()
    journal_of(tmp_path / "data").parent.mkdir()
    assert make() == undisturbed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "undisturbed"]
