"""One run at a time in a folder: a second one, started by mistake or by an eager scheduler, is refused."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EACCES, EAGAIN
from pathlib import Path

from distill.errors import UserError


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold ``folder``, if it is there, until the block ends or the process does, however it does.

    It is the folder itself that is locked, so nothing is left in it. File systems that know no locks have none.

    Raises:
        UserError: another process holds it.
    """
    if not folder.is_dir():
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        _lock(handle, folder)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, folder: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (EAGAIN, EACCES):
            raise UserError(
                f"another run is at work in {folder}; wait until it has ended, stop it, or choose another run_dir"
            ) from None
