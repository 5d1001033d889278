"""What every program of the project does alike.

A user's mistake, or a full disk, ends it with one screen of text and exit code 2. Nothing moves in a log file.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from distill.errors import UserError

USER_ERROR = 2
_SCREEN = 20  # lines
_LINE = 500  # characters; libraries sometimes put a whole page into an exception
_PATIENCE = 10.0  # seconds by which processes that start together may be apart


@contextmanager
def report_user_errors() -> Iterator[None]:
    """Prints a `UserError`, or that the disk is full, on stderr and exits with code 2.

    Any other exception keeps its traceback.
    Around a block (``with report_user_errors():``) or a function (``@report_user_errors()``).
    """
    try:
        yield
    except UserError as error:
        if _is_to_say(error):
            _say(str(error))
        _let_all_say(error)
        sys.exit(USER_ERROR)
    except Exception as error:
        from distill.atomic import is_disk_full

        if not is_disk_full(error):
            raise
        _say(f"the disk is full ({error}); free some space and run the same command again")
        sys.exit(USER_ERROR)


def quiet_unless_watched() -> None:
    """No progress bars of transformers in files and pipes; no remark of DeepSpeed, if installed, about this machine."""
    import torch
    from transformers.utils import logging

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def _say(message: str) -> None:
    print(_screen(message), file=sys.stderr, flush=True)


def _is_to_say(error: UserError) -> bool:
    """Whether this process prints it: of several that were launched together, one does if all have the same to say.

    Before they have joined, all do the same.
    """
    if os.environ.get("RANK", "0") == "0":
        return True
    from torch import distributed

    return distributed.is_initialized() and not error.everyones


def _let_all_say(error: UserError) -> None:
    """Return when the process that prints has done so: the first that ends makes a launcher end the others."""
    from torch import distributed

    from distill.engines import processes

    if not distributed.is_initialized():
        time.sleep(0 if _is_to_say(error) else _PATIENCE)
    elif error.everyones:
        with suppress(RuntimeError):  # the other is gone, and has said it or cannot
            processes.wait()


def _screen(text: str) -> str:
    lines = text.splitlines() or ["the command cannot be carried out"]
    shown = [line if len(line) <= _LINE else line[: _LINE - 1] + "…" for line in lines[:_SCREEN]]
    if len(lines) > _SCREEN:
        shown.append(f"... and {len(lines) - _SCREEN} more lines")
    return "\n".join(shown)
