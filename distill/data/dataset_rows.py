"""Read what ``datasets`` knows: a saved folder, a dataset of the Hub that is downloaded, or one that is streamed."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distill.data.readers import Document, check_key, text_document
from distill.errors import UserError

ALLOWED = "allowed: dataset:ORG/NAME[:CONFIG[:SPLIT]], where the split is 'train' unless given"


def is_saved_dataset(folder: Path) -> bool:
    """Whether ``save_to_disk`` of ``datasets`` wrote this folder."""
    saved = (folder / "state.json").exists() and (folder / "dataset_info.json").exists()
    return saved or (folder / "dataset_dict.json").exists()


def open_saved_dataset(folder: Path) -> Any:
    """A folder that ``save_to_disk`` wrote; of several splits, ``train``."""
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
    return loaded


def open_hub_dataset(reference: str) -> Any:
    """The rows of ``ORG/NAME[:CONFIG[:SPLIT]]``, all of them downloaded."""
    import datasets

    path, config, split = _parts_of(reference)
    try:
        return datasets.load_dataset(path, config, split=split)
    except Exception as error:  # the hub, its cache and a dozen formats, each with exceptions of its own
        raise _cannot_load(reference, error) from error


def open_hub_stream(reference: str) -> tuple[Any, str]:
    """The rows of ``ORG/NAME[:CONFIG[:SPLIT]]``, fetched as they are read, and a digest of the files they are in."""
    import datasets

    path, config, split = _parts_of(reference)
    try:
        builder = datasets.load_dataset_builder(path, config)
        stream = builder.as_streaming_dataset(split=split)
        files = (builder.config.data_files or {}).get(split)
    except Exception as error:
        raise _cannot_load(reference, error) from error
    # The names of files on the Hub hold the commit; others come with their time or entity tag.
    told = [builder.hash] if files is None else [list(files), files.origin_metadata]
    return stream, hashlib.sha256(json.dumps(told).encode()).hexdigest()


def dataset_rows(dataset: Any, text_key: str, where: str, name: str, skip: int) -> Iterator[tuple[int, Document]]:
    """Documents of the rows after the first ``skip``, each with its row's number, counted from 1."""
    check_key(dataset.column_names, text_key, where)
    rows = dataset.select_columns([text_key]).skip(skip)
    for place, row in enumerate(rows, start=skip + 1):
        document = text_document(row[text_key], text_key, f"{where}, row {place - 1}", name)
        if document:
            yield place, document


def stream_rows(
    stream: Any, text_key: str, where: str, name: str, place: dict[str, Any] | None
) -> Iterator[tuple[dict[str, Any], Document]]:
    """Documents of the rows after ``place``, each with the place after it: rows read, and the stream's ``state_dict``.

    Raises:
        UserError: Also when the connection is lost for longer than ``datasets`` retries.
    """
    if stream.column_names is not None:
        check_key(stream.column_names, text_key, where)
        stream = stream.select_columns([text_key])
    n_rows = 0
    if place is not None:
        n_rows = place["rows"]
        stream.load_state_dict(place["state"])
    try:
        for row in stream:
            n_rows += 1
            check_key(list(row), text_key, where)
            document = text_document(row[text_key], text_key, f"{where}, row {n_rows - 1}", name)
            if document:
                yield {"rows": n_rows, "state": stream.state_dict()}, document
    except UserError:
        raise
    except Exception as error:  # the network's, the file system's, the format's
        raise UserError(
            f"data.source {where!r}: the stream broke off after row {n_rows} ({_first_line(error)}); "
            "the same command goes on from the last part that was prepared"
        ) from error


def _parts_of(reference: str) -> tuple[str, str | None, str]:
    path, *rest = reference.split(":")
    if not path or len(rest) > 2:
        raise UserError(f"data.source 'dataset:{reference}'; {ALLOWED}")
    config, split = [*rest, "", ""][:2]
    return path, config or None, split or "train"


def _cannot_load(reference: str, error: Exception) -> UserError:
    return UserError(f"data.source 'dataset:{reference}': datasets cannot load it ({_first_line(error)}); {ALLOWED}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
