"""One run at a time in a folder: a second one, started by mistake or by an eager scheduler, is refused.

Programs that only read (``distill consolidate``, ``distill generate``, ``eval.report``) need no lock: what stands in a
run's folder under its name is whole.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import EACCES, EAGAIN
from pathlib import Path

from distill.atomic import explained_full_disk
from distill.errors import UserError

LOCK = ".lock"
_TRIES = 100


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold ``folder`` until the block ends or the process does, however it does.

    A folder that is not there is made, and goes again, with those above it, if nothing else was put into it. What is
    locked (flock) is a file in it; a killed process leaves that behind, and then it holds nobody up.

    On one machine the lock always holds. Between machines it holds over NFS, where Linux asks the server for a lock on
    a file that is open for writing (unless it is mounted with ``nolock`` or ``local_lock``), and over other file
    systems that keep locks for all their machines, such as Lustre mounted with ``flock``. One that knows no locks
    refuses nobody.

    Raises:
        UserError: another process holds it, or the disk is full.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with explained_full_disk(folder):
        handle = _held(folder)
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)  # while it is ours, so that whoever has opened it sees that it went
        for path in made:
            with suppress(OSError):
                path.rmdir()
        os.close(handle)


def _held(folder: Path) -> int:
    """The file, open and locked; taken anew as long as runs that end just now take it away."""
    for _ in range(_TRIES):
        with suppress(FileNotFoundError):
            return _taken(folder)
    return _taken(folder)


def _taken(folder: Path) -> int:
    """The file, open and locked.

    Raises:
        FileNotFoundError: a run that ended just now took it, or the folder, away.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _lock(handle, folder)
        if not os.path.samestat(os.fstat(handle), path.stat()):
            raise FileNotFoundError(path)
    except BaseException:
        os.close(handle)
        raise
    return handle


def _lock(handle: int, folder: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (EAGAIN, EACCES):
            raise UserError(
                f"another run is at work in {folder}; wait until it has ended, stop it, or choose another run_dir"
            ) from None
