"""A preparation under way: files that grow part by part, and a journal of the parts, so that a kill costs one part.

    .NAME.parts/  parts.jsonl  data/train.tokens  data/train.starts  data/held_out.tokens  data/held_out.starts

The first line of the journal says what the parts are made from. Each further line is a part: where in the source it
ends, what is counted up to there, and the size and SHA-256 of what it added to each file. A part's bytes are on the
disk before its line is. When all is read, ``data`` gets the name it was made for and the rest goes.
"""

import fcntl
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from distill.atomic import flush_to_disk, put_in_place, replace_file
from distill.data.blocks import MANIFEST, Manifest
from distill.data.growing import GrowingSplit
from distill.data.progress import say
from distill.data.readers import Document
from distill.data.splits import SPLITS, Extent
from distill.data.tokenising import Encoded
from distill.errors import UserError

JOURNAL = "parts.jsonl"


@dataclass(frozen=True)
class MadeFrom:
    """What parts are made from.

    Attributes:
        settings: A digest of all that decides the tokens besides the text: tokenizer, options, split.
        shards: The versions of the shards (as JSON holds them), in the order they are read. The parts of those that
            come before the first one that changed stay good.
    """

    settings: str
    shards: list[Any]


class Parts:
    """The parts of a folder that is being prepared.

    Attributes:
        splits: What there is of each split so far.
        position: How far the source has been read: the shard's index, and the place in it; None at its beginning.
        count: The parts so far.
        pending: Characters added since the last part.
    """

    def __init__(self, work: Path, made_from: MadeFrom, itemsize: int) -> None:
        """Take over from the journal what is intact and of this source."""
        data = work / "data"
        data.mkdir(exist_ok=True)
        self.splits = {name: GrowingSplit(data, name, itemsize) for name in SPLITS}
        self.position: Any = None
        self.count = self.pending = 0
        self._work, self._journal = work, work / JOURNAL

        lines = _still_good(_lines_of(self._journal), made_from, self._journal)
        for line in lines:
            damaged = [file for name, split in self.splits.items() for file in split.damaged(line["splits"][name])]
            if damaged:
                warnings.warn(
                    f"{data / damaged[0]}: part {self.count + 1} of {len(lines)} is damaged (its SHA-256 differs); it"
                    " is prepared again, and so is what comes after it",
                    stacklevel=2,
                )
                break
            self._accept(line)
        kept = [asdict(made_from), *lines[: self.count]]
        replace_file(self._journal, "".join(map(_as_line, kept)).encode())
        flush_to_disk(work)

    @property
    def extent(self) -> Extent:
        """How much text has been added."""
        splits = self.splits.values()
        return Extent(sum(split.documents for split in splits), sum(split.characters for split in splits))

    def add(self, split: str, document: Document, encoded: Encoded, position: Any) -> None:
        """Add a document to the part that is being made; ``position`` is behind it."""
        self.splits[split].add(document, encoded)
        self.position = position
        self.pending += len(document.text)

    def seal(self) -> None:
        """End the part: from now on it outlives this process."""
        line = {"end": self.position, "splits": {name: split.seal() for name, split in self.splits.items()}}
        with self._journal.open("a") as file:
            file.write(_as_line(line))
            file.flush()
            os.fsync(file.fileno())
        self.count += 1
        self.pending = 0

    def finish(self, manifest: Manifest, folder: Path) -> None:
        """Give the files, of which all is sealed, their name."""
        replace_file(self._work / "data" / MANIFEST, json.dumps(asdict(manifest), indent=2).encode())
        put_in_place(self._work / "data", folder)
        shutil.rmtree(self._work)

    def _accept(self, line: dict[str, Any]) -> None:
        for name, split in self.splits.items():
            split.accept(line["splits"][name])
        self.position = line["end"]
        self.count += 1


@contextmanager
def open_parts(folder: Path, made_from: MadeFrom, itemsize: int) -> Iterator[Parts]:
    """The parts of ``folder``, for this process alone. What a failure leaves behind is whole parts, or nothing.

    Raises:
        UserError: another process prepares the folder.
    """
    work = _beside(folder)
    made = [above for above in folder.parents if not above.exists()]
    work.mkdir(parents=True, exist_ok=True)
    with _locked(work, folder):
        try:
            yield Parts(work, made_from, itemsize)
        except BaseException:
            if len(_lines_of(work / JOURNAL)) < 2:
                shutil.rmtree(work, ignore_errors=True)
                for above in made:  # the innermost first
                    with suppress(OSError):
                        above.rmdir()
            raise


def discard_parts(folder: Path) -> None:
    """Remove parts that nobody works on: ``folder`` is there."""
    work = _beside(folder)
    if work.exists():
        with suppress(UserError), _locked(work, folder):
            shutil.rmtree(work, ignore_errors=True)


def _beside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.parts")


@contextmanager
def _locked(work: Path, folder: Path) -> Iterator[None]:
    """Nobody else may have this lock; the kernel takes it back from a process that is killed."""
    handle = os.open(work, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = work.exists() and os.path.samestat(os.fstat(handle), work.stat())
        except BlockingIOError:
            is_ours = False
        if not is_ours:
            raise UserError(f"{folder}: another process is preparing it; wait until it is done, or end it first")
        yield
    finally:
        os.close(handle)


def _as_line(told: dict[str, Any]) -> str:
    """A line of the journal, which begins with a digest of itself."""
    text = json.dumps(told)
    return f"{hashlib.sha256(text.encode()).hexdigest()} {text}\n"


def _lines_of(journal: Path) -> list[dict[str, Any]]:
    """What a journal says, up to a line that is damaged, or was not written to its end by a process that was killed."""
    told: list[dict[str, Any]] = []
    lines = journal.read_text(errors="replace").splitlines(keepends=True) if journal.exists() else []
    for number, line in enumerate(lines, start=1):
        sha256, _, text = line.rstrip("\n").partition(" ")
        if not line.endswith("\n"):
            break
        if hashlib.sha256(text.encode()).hexdigest() != sha256:
            warnings.warn(f"{journal}:{number} is damaged; what follows it is prepared again", stacklevel=2)
            break
        told.append(json.loads(text))
    return told


def _still_good(lines: list[dict[str, Any]], made_from: MadeFrom, journal: Path) -> list[dict[str, Any]]:
    """The parts that are of this source and these settings."""
    if not lines:
        return []
    before, parts = lines[0], lines[1:]
    if before == asdict(made_from):
        return parts
    if before.get("settings") != made_from.settings:
        good = []
    else:
        pairs = zip(before["shards"], made_from.shards, strict=False)
        n_same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        good = [part for part in parts if part["end"][0] < n_same]
    if len(good) < len(parts):
        why = "the source changed" if good else "they were made from another source or with other settings"
        say(f"{journal.parent}: {len(parts) - len(good)} of {len(parts)} part(s) are not used again, because {why}")
    return good
