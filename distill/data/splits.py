"""Which documents are held out: decided one document at a time, so that no text has to be held in memory."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from distill.data.readers import Document
from distill.errors import UserError

TRAIN, HELD_OUT = "train", "held_out"
SPLITS = (TRAIN, HELD_OUT)


class Extent(NamedTuple):
    """How much text: documents and their characters."""

    documents: int = 0
    characters: int = 0

    def and_one(self, document: Document) -> "Extent":
        return Extent(self.documents + 1, self.characters + len(document.text))


class SplitRule(Protocol):
    """A rule that puts each document on a side."""

    def holds_out(self, document: Document, before: Extent) -> bool:
        """Whether the document that comes after ``before`` is held out."""


@dataclass(frozen=True)
class ByHash:
    """Hold out the documents whose name hashes below ``fraction``.

    Adding or removing documents never moves another one, on any machine or Python.
    """

    fraction: float

    def holds_out(self, document: Document, before: Extent) -> bool:
        return _unit_hash(document.name) < self.fraction


@dataclass(frozen=True)
class ByTail:
    """Hold out the end of a text of extent ``total``: about the last ``fraction`` of its characters.

    It is cut at the border between two documents that is nearest to the wanted character.
    """

    fraction: float
    total: Extent

    def holds_out(self, document: Document, before: Extent) -> bool:
        if before.documents == 0:
            return False
        if before.documents == self.total.documents - 1:
            return True
        # Once a border is nearer than the one after it, so are all that follow.
        wanted = (1 - self.fraction) * self.total.characters
        return abs(before.characters - wanted) <= abs(before.characters + len(document.text) - wanted)


def split_documents(
    documents: Iterable[Document], *, fraction: float, by: str = "hash"
) -> tuple[list[Document], list[Document]]:
    """Split documents into lists of (training, held out): see ``ByHash`` and ``ByTail``.

    Raises:
        UserError: ``fraction`` is not between 0 and 1, ``by`` is unknown, or one side would be empty.
    """
    documents = list(documents)
    if not 0 < fraction < 1:
        raise UserError(f"data.held_out.fraction is {fraction}; allowed: more than 0 and less than 1")
    if by not in ("hash", "tail"):
        raise UserError(f"data.held_out.by is {by!r}; allowed: 'hash', 'tail'")
    rule: SplitRule = ByHash(fraction) if by == "hash" else ByTail(fraction, extent_of(documents))
    sides: tuple[list[Document], list[Document]] = [], []
    before = Extent()
    for document in documents:
        sides[rule.holds_out(document, before)].append(document)
        before = before.and_one(document)
    require_both_sides(len(sides[0]), len(sides[1]), f"by {by} at {fraction}")
    return sides


def extent_of(documents: Iterable[Document]) -> Extent:
    """How much text there is; the documents are read and forgotten."""
    extent = Extent()
    for document in documents:
        extent = extent.and_one(document)
    return extent


def require_both_sides(n_train: int, n_held_out: int, how: str) -> None:
    """Raises UserError if a side has no document; ``how`` says how they were split."""
    if not n_train or not n_held_out:
        raise UserError(
            f"splitting {n_train + n_held_out} document(s) {how} leaves nothing "
            f"{'to train on' if n_held_out else 'held out'}; give more documents, set data.separator so that "
            "text files are cut into documents, or change data.held_out"
        )


def _unit_hash(name: str) -> float:
    """A number in [0, 1) that depends on the name alone (``hash()`` would differ from run to run)."""
    return int.from_bytes(hashlib.sha256(name.encode(errors="replace")).digest()[:6]) / 2**48
