"""Whether the code in a student's folder is the code that was written there; part of that code itself."""

import hashlib
from collections.abc import Mapping
from pathlib import Path


def fingerprint(text: str) -> str:
    """Of a file's text as Python reads it, however its lines end: 16 hexadecimal digits of its SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def require_intact(folder: Path, written: Mapping[str, str]) -> None:
    """Compare the files beside a student's class with the fingerprints it was written with.

    Two exports copied into one folder, or half of an update, would otherwise compute something that neither of them
    did, without a word.

    Raises:
        ImportError: naming the files that differ.
    """
    differing = [name for name, sha256 in written.items() if _fingerprint_at(folder / name) != sha256]
    if differing:
        raise ImportError(
            f"{', '.join(differing)} in {folder}: not what this model's code was written with. The folder holds files"
            " of two exports, or they were edited: export the student anew, or, to keep an edit, take the file's line"
            " out of WRITTEN in the file with the model's class."
        )


def _fingerprint_at(path: Path) -> str | None:
    return fingerprint(path.read_text(encoding="utf-8")) if path.is_file() else None
