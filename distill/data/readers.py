"""Read one file, or one dataset, of each kind as documents."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.errors import UserError

ROW_SUFFIXES = frozenset({".jsonl", ".parquet"})


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
) -> Iterator[Document]:
    """Documents of a ``.jsonl``, ``.parquet`` or (whatever else it ends in) text file.

    Args:
        path: The file.
        name: What its documents are named after.
        text_key: The key of the text in rows.
        separator: What separates the documents of a text file; None makes it one document.
        may_be_empty: Let an empty text file pass without a document, as an ``__init__.py`` that was found in
            a folder; a file that was asked for by name is expected to hold something.

    Raises:
        UserError: The file is missing, empty, binary, not UTF-8, or not what its ending says.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from _read_parquet(path, name, text_key)
        return
    text = _text_of(path)
    if not text.strip():
        if may_be_empty and suffix not in ROW_SUFFIXES:
            return
        raise UserError(f"{path}: the file is empty; give a file with text in it")
    if suffix == ".jsonl":
        yield from _read_jsonl(path, name, text, text_key)
    elif separator is None:
        yield Document(name, text)
    else:
        yield from (_part(name, piece) for piece in text.split(separator) if piece.strip())


def is_saved_dataset(folder: Path) -> bool:
    """Whether ``save_to_disk`` of ``datasets`` wrote this folder."""
    saved = (folder / "state.json").exists() and (folder / "dataset_info.json").exists()
    return saved or (folder / "dataset_dict.json").exists()


def read_saved_dataset(folder: Path, text_key: str) -> Iterator[Document]:
    """Rows of a folder that ``save_to_disk`` wrote; of several splits, those of ``train``."""
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # datasets lets through whatever its file formats raise
        raise UserError(f"{folder}: datasets cannot load this folder ({_first_line(error)})") from error
    if isinstance(loaded, datasets.DatasetDict):
        if "train" not in loaded:
            raise UserError(
                f"{folder}: holds the splits {', '.join(loaded)} and no 'train'; give the folder of one split"
            )
        loaded = loaded["train"]
    yield from _dataset_rows(loaded, text_key, str(folder), folder.name)


def read_hub_dataset(reference: str, text_key: str) -> Iterator[Document]:
    """Rows of ``ORG/NAME[:CONFIG[:SPLIT]]``, loaded by ``datasets``; the split is ``train`` unless given."""
    import datasets

    allowed = "allowed: dataset:ORG/NAME[:CONFIG[:SPLIT]], where the split is 'train' unless given"
    path, *rest = reference.split(":")
    if not path or len(rest) > 2:
        raise UserError(f"data.source 'dataset:{reference}'; {allowed}")
    config, split = [*rest, "", ""][:2]
    try:
        loaded = datasets.load_dataset(path, config or None, split=split or "train")
    except Exception as error:  # the hub, its cache and a dozen formats, each with exceptions of its own
        raise UserError(
            f"data.source 'dataset:{reference}': datasets cannot load it ({_first_line(error)}); {allowed}"
        ) from error
    yield from _dataset_rows(loaded, text_key, f"dataset:{reference}", path)


def _text_of(path: Path) -> str:
    """The file as UTF-8 text, its line ends untouched."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a readable file") from error
    if b"\0" in data:
        raise UserError(f"{path}: is a binary file (zero byte at offset {data.index(0)}); give text files")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: is not UTF-8 text (byte 0x{data[error.start]:02x} at offset {error.start}); "
            "if it is text, convert it, for example with iconv -t utf-8"
        ) from error


def _read_jsonl(path: Path, name: str, text: str, text_key: str) -> Iterator[Document]:
    # Not str.splitlines: it also cuts at U+2028 and the like, which JSON strings may hold as they are.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{where}: is not JSON ({error.msg}, column {error.colno}); each line must be a JSON object"
            ) from error
        if not isinstance(row, dict):
            raise UserError(f"{where}: holds a {type(row).__name__}; each line must be a JSON object")
        _check_key(list(row), text_key, where)
        yield from _row(row[text_key], text_key, where, name)


def _read_parquet(path: Path, name: str, text_key: str) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        table = pyarrow.parquet.ParquetFile(path)
        _check_key(table.schema_arrow.names, text_key, str(path))
        for batch in table.iter_batches(columns=[text_key]):
            for text in batch.column(0).to_pylist():
                yield from _row(text, text_key, f"{path}, row {number}", name)
                number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as Parquet ({_first_line(error)}); is the file whole?") from error


def _dataset_rows(dataset: Any, text_key: str, where: str, name: str) -> Iterator[Document]:
    _check_key(dataset.column_names, text_key, where)
    for number, row in enumerate(dataset.select_columns([text_key])):
        yield from _row(row[text_key], text_key, f"{where}, row {number}", name)


def _check_key(keys: Sequence[str], text_key: str, where: str) -> None:
    if text_key not in keys:
        raise UserError(
            f"{where}: no key {text_key!r}; the keys are {', '.join(map(str, keys)) or '(none)'}; "
            "set data.text_key to the one with the text"
        )


def _row(text: Any, text_key: str, where: str, name: str) -> Iterator[Document]:
    """The document of one row; none where its text is null or blank."""
    if text is None:
        return
    if not isinstance(text, str):
        raise UserError(
            f"{where}: {text_key!r} holds a {type(text).__name__}, not text; set data.text_key to the key with the text"
        )
    if text.strip():
        yield _part(name, text)


def _part(name: str, text: str) -> Document:
    return Document(f"{name}#{hashlib.sha256(text.encode(errors='replace')).hexdigest()[:16]}", text)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
