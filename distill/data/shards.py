"""The shards of a source: files and datasets, each of which can be read from any place on."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from distill.data.dataset_rows import (
    dataset_rows,
    open_hub_dataset,
    open_hub_stream,
    open_saved_dataset,
    stream_rows,
)
from distill.data.readers import Document, read_file
from distill.errors import UserError

Place = Any
"""How far a shard has been read, in terms of its own, as JSON holds it."""


class Shard(Protocol):
    """A part of a source."""

    @property
    def entry(self) -> str:
        """The entry of ``data.source`` that it belongs to."""

    def identity(self) -> Any:
        """What tells whether prepared data is of this shard as it is now, as JSON; the Hub is not asked."""

    def version(self) -> Any:
        """What tells whether its rows are still those that were read before; the Hub is asked."""

    def read(self, place: Place | None) -> Iterator[tuple[Place, Document]]:
        """The documents after ``place`` (None: all), each with the place after it."""


@dataclass(frozen=True)
class FileShard:
    """A file, known by its name inside the source, its size and its time."""

    entry: str
    path: Path
    name: str
    text_key: str
    separator: str | None
    may_be_empty: bool

    def identity(self) -> list:
        return [self.name, *_size_and_time(self.path)]

    def version(self) -> list:
        return self.identity()

    def read(self, place: Place | None) -> Iterator[tuple[Place, Document]]:
        return read_file(
            self.path,
            self.name,
            self.text_key,
            self.separator,
            may_be_empty=self.may_be_empty,
            skip=place or 0,
        )


@dataclass(frozen=True)
class SavedDataset:
    """A folder that ``save_to_disk`` wrote, known by the sizes and times of its files."""

    entry: str
    folder: Path
    text_key: str

    def identity(self) -> list:
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return [self.folder.name, *([path.name, *_size_and_time(path)] for path in files)]

    def version(self) -> list:
        return self.identity()

    def read(self, place: Place | None) -> Iterator[tuple[Place, Document]]:
        rows = open_saved_dataset(self.folder)
        return dataset_rows(rows, self.text_key, str(self.folder), self.folder.name, skip=place or 0)


@dataclass(frozen=True)
class HubDataset:
    """A dataset of the Hub, downloaded before it is read. Once prepared it is known by its name alone."""

    entry: str
    reference: str
    text_key: str

    @cached_property
    def _rows(self) -> Any:
        return open_hub_dataset(self.reference)

    def identity(self) -> list:
        return [self.entry, "downloaded"]

    def version(self) -> list:
        return [self.entry, len(self._rows), *(file["filename"] for file in self._rows.cache_files)]

    def read(self, place: Place | None) -> Iterator[tuple[Place, Document]]:
        name = self.reference.partition(":")[0]
        return dataset_rows(self._rows, self.text_key, self.entry, name, skip=place or 0)


@dataclass(frozen=True)
class HubStream:
    """A dataset of the Hub, fetched while it is read. Once prepared it is known by its name alone."""

    entry: str
    reference: str
    text_key: str

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        return open_hub_stream(self.reference)

    def identity(self) -> list:
        return [self.entry, "streamed"]

    def version(self) -> list:
        return [self.entry, self._opened[1]]

    def read(self, place: Place | None) -> Iterator[tuple[Place, Document]]:
        name = self.reference.partition(":")[0]
        return stream_rows(self._opened[0], self.text_key, self.entry, name, place)


def _size_and_time(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a readable file") from error
    return found.st_size, found.st_mtime_ns
