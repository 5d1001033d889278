"""What prepared folders hold, for comparing them, and processes that are killed while they prepare one."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from distill.data import Blocks

Operation = Callable[[str, tuple], bool]
"""Whether an audit event of Python is of the kind that is counted."""


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tokens_of(folder: Path, split: str = "train") -> list[list[int]]:
    """The token ids of each document."""
    return [ids.tolist() for ids in Blocks(folder, split, 2).documents()]


def journal_of(folder: Path) -> Path:
    """Where the parts of a folder that is being prepared are told."""
    return folder.with_name(f".{folder.name}.parts") / "parts.jsonl"


def n_parts(folder: Path) -> int:
    """How many whole parts a preparation that was ended left behind."""
    journal = journal_of(folder)
    return len(journal.read_text().splitlines()) - 1 if journal.exists() else 0


def touching_files(event: str, arguments: tuple) -> bool:
    return event == "open" or event.startswith(("os.", "shutil."))


def sealing(event: str, arguments: tuple) -> bool:
    """A part's bytes are on the disk, its line is about to be written."""
    return event == "open" and str(arguments[0]).endswith("parts.jsonl") and arguments[1] == "a"


def killed_at(n: int, operation: Operation, action: Callable[[], object]) -> bool:
    """Act in a process that kills itself just before the nth such operation; whether it came to that."""
    child = os.fork()
    if child == 0:
        kill_at(n, operation)
        try:
            action()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def kill_at(n: int, operation: Operation, before: Callable[[], object] = lambda: None) -> None:
    """Have this process killed just before its nth such operation, after a last call."""
    seen = 0

    def count(event: str, arguments: tuple) -> None:
        nonlocal seen
        if operation(event, arguments):
            seen += 1
            if seen == n:
                before()
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
