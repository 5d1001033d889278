"""A disk that is small enough to fill up."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


class SmallDisk:
    """A small file system; ``leave`` fills it up until only so many bytes are free."""

    def __init__(self, mount: Path) -> None:
        self.mount, self.run, self.filler = mount, mount / "run", mount / "filler"

    def leave(self, free: int) -> None:
        self.filler.write_bytes(bytes(shutil.disk_usage(self.mount).free - free))

    def free(self) -> None:
        self.filler.unlink()


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[SmallDisk]:
    """Mount one; skips the test where that is not allowed."""
    mount = folder / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(mount)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a small tmpfs needs root and the right to mount")
    try:
        yield SmallDisk(mount)
    finally:
        subprocess.run(["umount", str(mount)], check=True)
