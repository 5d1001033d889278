"""A prepared folder and its blocks: token files on disk, served as rows of a fixed number of tokens.

The folder holds, for each split, ``SPLIT.tokens`` (all tokens of all documents, one after another, little-endian
uint16 or uint32) and ``SPLIT.starts`` (int64: the place of each document's first token), and ``manifest.json``,
which says what went in. A block is a slice of the token file: its size is no property of the files, so one
folder serves every block size.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distill.errors import UserError

MANIFEST = "manifest.json"
FORMAT = 2
IGNORED = -100  # the label of a token that is not predicted, as in torch's cross entropy


@dataclass(frozen=True)
class Split:
    """What a manifest says of one split: counts, and the sha256 of its two files."""

    documents: int
    characters: int
    utf8_bytes: int
    tokens: int
    sha256: dict[str, str]


@dataclass(frozen=True)
class Manifest:
    """What a prepared folder holds.

    Attributes:
        fingerprint: Of the documents, the tokenizer and the options: it changes when the tokens may.
        request: Of what was asked for, sources as they are listed: what tells, unread, whether this is it.
        dtype: Of a token in the files.
        bos: Whether the tokenizer's BOS stands before each document.
        eos: Whether its EOS stands after each.
    """

    fingerprint: str
    request: str
    dtype: str
    bos: bool
    eos: bool
    splits: dict[str, Split]
    format: int = FORMAT


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a prepared folder; raises UserError if it is missing or unreadable."""
    path = Path(folder) / MANIFEST
    try:
        fields = json.loads(path.read_text())
        fields["splits"] = {name: Split(**split) for name, split in fields["splits"].items()}
        manifest = Manifest(**fields)
    except FileNotFoundError as error:
        raise UserError(f"{folder}: is no prepared data ({MANIFEST} is missing); prepare it first") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read, the prepared data is damaged; prepare it again") from error
    if manifest.format != FORMAT:
        raise UserError(f"{path}: has format {manifest.format}, not {FORMAT}; prepare the data again")
    return manifest


class Blocks:
    """The blocks of one split of a prepared folder: a map-style dataset with ``block`` tokens a row.

    Rows are those of ``batch``, without its first dimension. Only the last row may be padded.

    Attributes:
        block: Tokens a row.
        n_tokens: Tokens in the split.
        n_full: Rows without padding.
        n_documents: Documents in the split.
        utf8_bytes: Bytes of the split's text, for losses per byte.
        fingerprint: Of the documents of both splits, the tokenizer and the options.
    """

    def __init__(self, folder: str | Path, split: str, block: int) -> None:
        """Open split ``"train"`` or ``"held_out"``; raises UserError if the folder is not prepared or damaged."""
        folder = Path(folder)
        if block < 2:
            raise UserError(f"data.block is {block}; allowed: at least 2, or no token has a next one")
        manifest = read_manifest(folder)
        if split not in manifest.splits:
            raise UserError(f"{folder}: no split {split!r}; allowed: {', '.join(manifest.splits)}")
        facts = manifest.splits[split]
        dtype = np.dtype(manifest.dtype)
        _check_size(folder / f"{split}.tokens", facts.tokens * dtype.itemsize)
        _check_size(folder / f"{split}.starts", facts.documents * 8)
        self.block = block
        self.n_tokens = facts.tokens
        self.n_full = facts.tokens // block
        self.n_documents = facts.documents
        self.utf8_bytes = facts.utf8_bytes
        self.fingerprint = manifest.fingerprint
        self._tokens = np.memmap(folder / f"{split}.tokens", dtype, mode="r", shape=(facts.tokens,))
        self._starts = np.memmap(folder / f"{split}.starts", "<i8", mode="r", shape=(facts.documents,))

    def __len__(self) -> int:
        return -(-self.n_tokens // self.block)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Row ``index``: input_ids, position_ids, labels (T,) int64 and valid (T,) bool."""
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        first = index * self.block
        tokens = self._tokens[first : first + self.block].astype(np.int64)
        n_valid = len(tokens)
        input_ids = np.pad(tokens, (0, self.block - n_valid))
        positions = np.arange(self.block)
        valid = positions < n_valid

        # What starts in this block: the block itself, documents, and the padding.
        low, high = np.searchsorted(self._starts, [first, first + n_valid])
        starts = positions == 0
        starts[self._starts[low:high] - first] = True
        starts[n_valid : n_valid + 1] = True
        row = {
            "input_ids": input_ids,
            "position_ids": positions - np.maximum.accumulate(np.where(starts, positions, 0)),
            "labels": np.where(starts | ~valid, IGNORED, input_ids),
            "valid": valid,
        }
        return {name: torch.from_numpy(values) for name, values in row.items()}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self[index] for index in range(len(self)))

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Several rows: input_ids, position_ids, labels (B, T) int64 and valid (B, T) bool.

        ``position_ids`` start again with every document, with the block and with the padding; ``labels`` are
        the input ids, but -100 where a document or the block starts and on padding; ``valid`` is False on
        padding.
        """
        rows = [self[index] for index in indices]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def documents(self) -> Iterator[np.ndarray]:
        """The token ids (L,) int64 of each document, specials included, in order."""
        for first, last in zip(self._starts, [*self._starts[1:], self.n_tokens], strict=True):
            yield self._tokens[first:last].astype(np.int64)


def _check_size(path: Path, wanted: int) -> None:
    size = path.stat().st_size if path.exists() else None
    if size != wanted:
        state = "is missing" if size is None else f"has {size} bytes instead of {wanted}"
        raise UserError(f"{path}: {state}, the prepared data is damaged; prepare it again")
