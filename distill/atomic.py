"""Folders that are there whole or not at all: written under another name, flushed to disk, then renamed."""

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from distill.errors import UserError

PARTIAL, REPLACED = ".partial", ".replaced"


@contextmanager
def whole_folder(folder: Path, needed: Callable[[], int] | None = None) -> Iterator[Path]:
    """Yield an empty folder to fill; it becomes ``folder``, replacing it, only when the block ends well.

    A process killed on the way leaves ``.NAME.partial`` or ``.NAME.replaced``, which the next attempt (or ``settle``)
    sees to.

    Args:
        folder: where it shall stand.
        needed: how many bytes will be written, for the message when the disk is full.

    Raises:
        UserError: the disk is full. Nothing is left behind and what stood at ``folder`` is untouched.
    """
    partial = _beside(folder, PARTIAL)
    folder.parent.mkdir(parents=True, exist_ok=True)
    settle(folder)
    shutil.rmtree(partial, ignore_errors=True)
    with explained_full_disk(folder, needed):
        try:
            partial.mkdir()
            yield partial
            put_in_place(partial, folder)
        except BaseException:
            settle(folder)
            shutil.rmtree(partial, ignore_errors=True)
            raise


def put_in_place(whole: Path, folder: Path) -> None:
    """Flush a finished folder to disk and rename it to ``folder``, replacing it; after a kill ``settle`` is due."""
    for path in (*whole.rglob("*"), whole):
        flush_to_disk(path)
    replaced = _beside(folder, REPLACED)
    if folder.is_symlink():
        folder.unlink()  # what it leads to is not ours to remove
    elif folder.exists():
        folder.rename(replaced)
    whole.rename(folder)
    flush_to_disk(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def partial_of(folder: Path) -> Path:
    """What ``whole_folder`` yields for ``folder``: for other processes that help to fill it."""
    return _beside(folder, PARTIAL)


def settle(folder: Path) -> None:
    """End what a process killed while it replaced ``folder`` began: the old folder is put back, or it goes."""
    replaced = _beside(folder, REPLACED)
    if replaced.is_symlink():
        replaced.unlink() if folder.exists() else replaced.rename(folder)
    elif replaced.exists():
        shutil.rmtree(replaced) if folder.exists() else replaced.rename(folder)


def replace_file(path: Path, data: bytes) -> None:
    """Write a file that is there whole or not at all, replacing what was there.

    Raises:
        UserError: the disk is full; what was there is untouched.
    """
    partial = path.with_name(f".{path.name}{PARTIAL}")
    with explained_full_disk(path, lambda: len(data)):
        try:
            partial.write_bytes(data)
            flush_to_disk(partial)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def explained_full_disk(path: Path, needed: Callable[[], int] | None = None) -> Iterator[None]:
    """Turn "no space left on device" into a message that says for what, and how much it takes.

    Raises:
        UserError: the disk is full.
    """
    free = shutil.disk_usage(next(above for above in path.absolute().parents if above.exists())).free
    try:
        yield
    except UserError:
        raise  # it has been explained
    except Exception as error:
        if not is_disk_full(error):
            raise
        wanted = f"{needed():,}" if needed else f"more than {free:,}"
        raise UserError(
            f"{path}: the disk is full. Writing it needs {wanted} bytes and {free:,} were free. What was saved"
            " before is untouched; free some space and run the same command again"
        ) from error


def settle_all(parent: Path) -> None:
    """See to what killed processes left in ``parent``: ``settle`` every folder, and remove what is half-written."""
    for path in parent.glob(f".*{REPLACED}"):
        settle(parent / path.name[1 : -len(REPLACED)])
    for path in parent.glob(f".*{PARTIAL}"):
        shutil.rmtree(path)


def _beside(folder: Path, ending: str) -> Path:
    return folder.with_name(f".{folder.name}{ending}")


def flush_to_disk(path: Path) -> None:
    """Return only when ``path`` (a file or a folder) would survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_disk_full(error: BaseException | None) -> bool:
    """Whether a full disk (or quota) is behind ``error``; libraries wrap the OSError, or keep only its text."""
    if error is None:
        return False
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return (
        full
        or "No space left on device" in str(error)
        or is_disk_full(error.__cause__)
        or is_disk_full(error.__context__)
    )


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
