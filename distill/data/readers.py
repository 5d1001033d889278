"""Read one file of any kind as documents, one after another and from any place on."""

import codecs
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.errors import UserError

ROW_SUFFIXES = frozenset({".jsonl", ".parquet"})

# Read at a time: bytes of a text file, rows of a Parquet file. Memory holds this much, or one document.
BLOCK_BYTES = 1 << 20
BATCH_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Document:
    """One text. ``name`` says where it came from and decides its side of a split by hash.

    A whole file is named by its path inside the source; a row or a piece of a file by the file's path and a
    digest of its text, so that neither adding rows nor moving the source changes any name, and equal rows
    stay on one side.
    """

    name: str
    text: str


def read_file(
    path: Path,
    name: str,
    text_key: str = "text",
    separator: str | None = None,
    *,
    may_be_empty: bool = False,
    skip: int = 0,
) -> Iterator[tuple[int, Document]]:
    """Documents of a ``.jsonl``, ``.parquet`` or (whatever else it ends in) text file, each with its place.

    The place is the number of the row, line or piece it is, counted from 1.

    Args:
        path: The file.
        name: What its documents are named after.
        text_key: The key of the text in rows.
        separator: What separates the documents of a text file; None makes it one document.
        may_be_empty: Let an empty text file pass without a document, as an ``__init__.py`` that was found in
            a folder; a file that was asked for by name is expected to hold something.
        skip: The place after which to begin.

    Raises:
        UserError: The file is missing, empty, binary, not UTF-8, or not what its ending says.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from _read_parquet(path, name, text_key, skip)
        return
    blocks = _text_blocks(path)
    if suffix == ".jsonl":
        # Not str.splitlines: it also cuts at U+2028 and the like, which JSON strings may hold as they are.
        pieces = _pieces(blocks, "\n")
    else:
        pieces = iter(["".join(blocks)]) if separator is None else _pieces(blocks, separator)
    is_blank = True
    for place, piece in enumerate(pieces, start=1):
        if not piece.strip():
            continue
        is_blank = False
        if place <= skip:
            continue
        if suffix == ".jsonl":
            document = _json_line(piece, name, text_key, f"{path}:{place}")
        else:
            document = Document(name, piece) if separator is None else _part(name, piece)
        if document:
            yield place, document
    if is_blank and (suffix == ".jsonl" or not may_be_empty):
        raise UserError(f"{path}: the file is empty; give a file with text in it")


def require_whole(path: Path) -> None:
    """Look whether a Parquet file begins and ends as one: cheap enough to ask of every shard before the first is read.

    Raises:
        UserError: It does not, as when its download or copy was cut short.
    """
    try:
        with path.open("rb") as file:
            head = file.read(4)
            file.seek(-min(4, path.stat().st_size), 2)
            tail = file.read(4)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a readable file") from error
    if head != b"PAR1" or tail != b"PAR1":
        raise _no_parquet(path, "its beginning or its end is missing")


def text_document(text: Any, text_key: str, where: str, name: str) -> Document | None:
    """The document of one row; none where its text is null or blank."""
    if text is None:
        return None
    if not isinstance(text, str):
        raise UserError(
            f"{where}: {text_key!r} holds a {type(text).__name__}, not text; set data.text_key to the key with the text"
        )
    return _part(name, text) if text.strip() else None


def check_key(keys: Sequence[str], text_key: str, where: str) -> None:
    """Raises UserError, which lists the keys, if the one with the text is not among them."""
    if text_key not in keys:
        raise UserError(
            f"{where}: no key {text_key!r}; the keys are {', '.join(map(str, keys)) or '(none)'}; "
            "set data.text_key to the one with the text"
        )


def _text_blocks(path: Path) -> Iterator[str]:
    """A file as UTF-8 text, its line ends untouched, block by block."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = unfinished = 0
    is_first = True
    try:
        with path.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                if b"\0" in block:
                    zero = offset + block.index(0)
                    raise UserError(f"{path}: is a binary file (zero byte at offset {zero}); give text files")
                unfinished = len(decoder.getstate()[0])
                text = decoder.decode(block)
                yield text.removeprefix("\ufeff") if is_first else text
                is_first = is_first and not text
                offset += len(block)
            unfinished = len(decoder.getstate()[0])
            decoder.decode(b"", final=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a readable file") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: is not UTF-8 text (byte 0x{error.object[error.start]:02x} at offset "
            f"{offset - unfinished + error.start}); if it is text, convert it, for example with iconv -t utf-8"
        ) from error


def _pieces(blocks: Iterator[str], separator: str) -> Iterator[str]:
    """What ``"".join(blocks).split(separator)`` holds, without joining more than a piece and a few blocks."""
    rest = new = ""
    for block in blocks:
        new += block
        if len(new) >= len(rest):  # so that a long piece is not searched again with every block
            *pieces, rest = (rest + new).split(separator)
            new = ""
            yield from pieces
    yield from (rest + new).split(separator)


def _json_line(line: str, name: str, text_key: str, where: str) -> Document | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: is not JSON ({error.msg}, column {error.colno}); each line must be a JSON object"
        ) from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: holds a {type(row).__name__}; each line must be a JSON object")
    check_key(list(row), text_key, where)
    return text_document(row[text_key], text_key, where, name)


def _read_parquet(path: Path, name: str, text_key: str, skip: int) -> Iterator[tuple[int, Document]]:
    import pyarrow
    import pyarrow.parquet

    place = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            check_key(file.schema_arrow.names, text_key, str(path))
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if place + rows <= skip:
                    place += rows
                    continue
                for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=[text_key]):
                    for text in batch.column(0).to_pylist():
                        place += 1
                        document = text_document(text, text_key, f"{path}, row {place - 1}", name)
                        if document and place > skip:
                            yield place, document
    except (pyarrow.ArrowException, OSError) as error:
        raise _no_parquet(path, str(error).strip().partition("\n")[0]) from error


def _no_parquet(path: Path, why: str) -> UserError:
    return UserError(f"{path}: cannot be read as Parquet ({why}); is the file whole? Fetch it again, or leave it out")


def _part(name: str, text: str) -> Document:
    return Document(f"{name}#{hashlib.sha256(text.encode(errors='replace')).hexdigest()[:16]}", text)
