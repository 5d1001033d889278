"""Files that grow part by part, each part of them known by its SHA-256."""

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from distill.data.blocks import Split
from distill.data.readers import Document
from distill.data.tokenising import Encoded


class GrowingFile:
    """A file to which each part adds some bytes. What is added stays in memory until the part is sealed."""

    def __init__(self, path: Path) -> None:
        path.touch()
        self.path = path
        self.size = 0  # of the parts so far; what a killed process left behind them is overwritten
        self.added = bytearray()
        self._whole = self._whole_with_next = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """Of the parts so far, as they were meant: not of what a failing disk made of them."""
        return self._whole.hexdigest()

    def seal(self) -> tuple[int, str]:
        """Write what was added, down to the disk; returns its size and SHA-256."""
        with self.path.open("r+b") as file:
            file.seek(self.size)
            file.truncate()
            file.write(self.added)
            file.flush()
            os.fsync(file.fileno())
        told = len(self.added), hashlib.sha256(self.added).hexdigest()
        self._whole.update(self.added)
        self.size += len(self.added)
        self.added.clear()
        return told

    def holds(self, size: int, sha256: str) -> bool:
        """Whether the next ``size`` bytes behind the parts so far have that SHA-256."""
        part, whole = hashlib.sha256(), self._whole.copy()
        with self.path.open("rb") as file:
            file.seek(self.size)
            for first in range(0, size, 1 << 20):
                block = file.read(min(size - first, 1 << 20))
                part.update(block)
                whole.update(block)
        self._whole_with_next = whole
        return part.hexdigest() == sha256

    def accept(self, size: int) -> None:
        """Count the next ``size`` bytes, which were found to hold what they should, among the parts."""
        self.size += size
        self._whole = self._whole_with_next


class GrowingSplit:
    """One split's files, and what is counted in them."""

    COUNTS = ("documents", "characters", "utf8_bytes", "chain")

    def __init__(self, folder: Path, name: str, itemsize: int) -> None:
        self.documents = self.characters = self.utf8_bytes = 0
        self.chain = ""  # a hash over all documents: each is hashed with what came before
        self._itemsize = itemsize
        self._tokens = GrowingFile(folder / f"{name}.tokens")
        self._starts = GrowingFile(folder / f"{name}.starts")
        self._files = {file.path.name: file for file in (self._tokens, self._starts)}

    @property
    def n_tokens(self) -> int:
        return (self._tokens.size + len(self._tokens.added)) // self._itemsize

    def add(self, document: Document, encoded: Encoded) -> None:
        tokens, utf8_bytes, sha256 = encoded
        self._starts.added += np.array(self.n_tokens, "<i8").tobytes()
        self._tokens.added += tokens
        self.documents += 1
        self.characters += len(document.text)
        self.utf8_bytes += utf8_bytes
        told = f"{self.chain}\n{sha256.hex()} {document.name}"
        self.chain = hashlib.sha256(told.encode(errors="replace")).hexdigest()

    def seal(self) -> dict[str, Any]:
        """What the journal says of a part of this split, once what was added is on the disk."""
        added = {name: file.seal() for name, file in self._files.items()}
        return {name: getattr(self, name) for name in self.COUNTS} | {"added": added}

    def damaged(self, told: dict[str, Any]) -> list[str]:
        """The files that do not hold the part that the journal tells of."""
        return [name for name, (size, sha256) in told["added"].items() if not self._files[name].holds(size, sha256)]

    def accept(self, told: dict[str, Any]) -> None:
        """Take over a part that the journal tells of, and that was not found ``damaged``."""
        for name, (size, _) in told["added"].items():
            self._files[name].accept(size)
        for name in self.COUNTS:
            setattr(self, name, told[name])

    def facts(self) -> Split:
        """What the manifest says of this split, all of it sealed."""
        return Split(
            documents=self.documents,
            characters=self.characters,
            utf8_bytes=self.utf8_bytes,
            tokens=self.n_tokens,
            sha256={name: file.sha256 for name, file in self._files.items()},
        )
