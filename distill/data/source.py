"""What can be prepared: documents in an order that never changes, each on its side of the split."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from distill.data.readers import Document
from distill.data.splits import HELD_OUT, TRAIN, Extent


class Item(NamedTuple):
    """A document of a source, the split it belongs to, and the position (JSON) behind it."""

    document: Document
    split: str
    position: Any


class Source(Protocol):
    """Where documents come from."""

    def request(self) -> Any:
        """What the documents are, as JSON: a folder that was prepared from the same is used again."""

    def made_from(self) -> tuple[Any, list[Any]]:
        """What parts must be made from to be gone on with, as JSON: options, and the version of each shard."""

    def split(self) -> str:
        """How the documents are split, in words: ``by hash at 0.1``."""

    def read(self, position: Any, before: Extent) -> Iterator[Item]:
        """What comes after ``position`` (None: all), where ``before`` is the text up to there."""

    def read_training_only(self, position: Any) -> Iterator[Item]:
        """What is trained on besides, whatever limit ended ``read``: all of it that comes after ``position``."""


@dataclass(frozen=True)
class DocumentsAtHand:
    """Two lists of documents as a source."""

    train: Sequence[Document]
    held_out: Sequence[Document]

    def request(self) -> str:
        told = hashlib.sha256()
        for document, split, _ in self.read(None, Extent()):
            told.update(json.dumps([split, document.name, document.text]).encode())
        return told.hexdigest()

    def made_from(self) -> tuple[Any, list[Any]]:
        return self.request(), []

    def split(self) -> str:
        return "as given"

    def read(self, position: Any, before: Extent) -> Iterator[Item]:
        sides = [(TRAIN, document) for document in self.train] + [(HELD_OUT, document) for document in self.held_out]
        for index, (split, document) in enumerate(sides):
            if position is None or index > position[1]:
                yield Item(document, split, [0, index])

    def read_training_only(self, position: Any) -> Iterator[Item]:
        return iter(())
