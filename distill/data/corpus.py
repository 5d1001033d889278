"""Find the shards of a source, and read them one after another as documents."""

import glob
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

from distill.data.dataset_rows import is_saved_dataset
from distill.data.readers import ROW_SUFFIXES, Document, require_whole
from distill.data.shards import FileShard, HubDataset, HubStream, Place, SavedDataset, Shard
from distill.errors import UserError

__all__ = ["DATASET_PREFIX", "PYTHON_STDLIB", "Document", "find_shards", "read_documents", "read_shards"]

Position = tuple[int, Place]
"""How far a source has been read: behind a document in a shard of that index."""

PYTHON_STDLIB = "python-stdlib"
DATASET_PREFIX = "dataset:"

# What a folder is searched for. A file given by its own name, or by a glob, may have any other ending.
TEXT_SUFFIXES = frozenset(
    {".txt", ".text", ".md", ".rst", ".tex", ".html", ".py", ".c", ".h", ".cc", ".cpp", ".rs", ".go", ".java"}
)

# Tests and bundled programs come and go between Python builds and would drown the library's own text;
# pydoc_data is the language reference in one generated file, as large as the next four files together.
STDLIB_LEFT_OUT = frozenset(
    {"test", "tests", "idlelib", "lib2to3", "turtledemo", "pydoc_data"}
    | {"site-packages", "dist-packages", "__pycache__"}
)


def read_documents(
    source: str | Path | Sequence[str | Path],
    *,
    text_key: str = "text",
    separator: str | None = None,
    streaming: bool = False,
    key: str = "data.source",
) -> Iterator[Document]:
    """Read every document of a source, in an order that depends on the source alone, without holding more than one.

    Args:
        source: ``"python-stdlib"`` (the standard library of the running Python); a text, ``.jsonl`` or
            ``.parquet`` file; a folder of such files, or one saved by ``datasets``; a glob;
            ``"dataset:ORG/NAME[:CONFIG[:SPLIT]]"``, which ``datasets`` loads; or a list of these.
        text_key: The key of the text in rows (``.jsonl``, ``.parquet``, datasets).
        separator: Cuts text files into documents, such as ``"\\n\\n"``; ``None`` makes a file one document.
        streaming: Fetch the rows of a ``dataset:`` as they are read, instead of downloading it first.
        key: What a recipe calls the source, for messages.

    Yields:
        Documents that hold more than white space.

    Raises:
        UserError: The source does not exist, or holds no text, or something in it is not text.
    """
    shards = find_shards(source, text_key=text_key, separator=separator, streaming=streaming, key=key)
    return (document for _, document in read_shards(shards))


def find_shards(
    source: str | Path | Sequence[str | Path],
    *,
    text_key: str = "text",
    separator: str | None = None,
    streaming: bool = False,
    key: str = "data.source",
) -> list[Shard]:
    """The shards of a source (see ``read_documents``), in the order they are read; no text is read yet.

    Raises:
        UserError: The source does not exist, or a Parquet file among it is cut short.
    """
    if separator == "":
        raise UserError("data.separator is empty; give the text between two documents, or null for none")
    entries = [source] if isinstance(source, str | Path) else list(source)
    if not entries:
        raise UserError(f"{key} is an empty list; give at least one file, folder or glob")
    return [shard for entry in map(str, entries) for shard in _shards_of(entry, text_key, separator, streaming, key)]


def read_shards(shards: Sequence[Shard], position: Position | None = None) -> Iterator[tuple[Position, Document]]:
    """The documents after ``position`` (None: all), each with the position after it.

    Raises:
        UserError: An entry of the source holds no text, or something in it is not text.
    """
    first, place = position or (0, None)
    for entry, group in groupby(list(enumerate(shards))[first:], key=lambda numbered: numbered[1].entry):
        found = place is not None  # a position stands behind a document
        for index, shard in group:
            for after, document in shard.read(place):
                found = True
                yield (index, after), document
            place = None
        if not found:
            raise UserError(f"data.source {entry!r} holds no text at all; give a source with text in it")


def _shards_of(entry: str, text_key: str, separator: str | None, streaming: bool, key: str) -> list[Shard]:
    """The shards of one entry of a source."""
    path = Path(entry).expanduser()
    if entry.startswith(DATASET_PREFIX):
        kind = HubStream if streaming else HubDataset
        return [kind(entry, entry.removeprefix(DATASET_PREFIX), text_key)]
    is_named = False
    if entry == PYTHON_STDLIB:
        root, paths = _stdlib()
        separator = None
    elif path.is_dir() and is_saved_dataset(path):
        return [SavedDataset(entry, path, text_key)]
    elif path.is_dir():
        root, paths = path, _files_in(path)
    elif path.exists():
        root, paths, is_named = path.parent, [path], True
    else:
        root, paths = _fixed_part(path), _files_like(path, key)
    for parquet in paths:
        if parquet.suffix.lower() == ".parquet":
            require_whole(parquet)
    return [
        FileShard(entry, path, path.relative_to(root).as_posix(), text_key, separator, may_be_empty=not is_named)
        for path in paths
    ]


def _stdlib() -> tuple[Path, list[Path]]:
    root = Path(sysconfig.get_path("stdlib"))

    def belongs(path: Path) -> bool:
        return path.suffix == ".py" and STDLIB_LEFT_OUT.isdisjoint(path.relative_to(root).parts)

    return root, _walk(root, belongs)


def _files_in(folder: Path) -> list[Path]:
    wanted = TEXT_SUFFIXES | ROW_SUFFIXES

    def belongs(path: Path) -> bool:
        hidden = any(part.startswith(".") or part == "__pycache__" for part in path.relative_to(folder).parts)
        return path.suffix.lower() in wanted and not hidden

    paths = _walk(folder, belongs)
    if not paths:
        raise UserError(
            f"{folder}: the folder holds no file that ends in one of {' '.join(sorted(wanted))}; "
            f"for other endings give a glob, such as '{folder}/**/*.log'"
        )
    return paths


def _files_like(pattern: Path, key: str) -> list[Path]:
    paths = sorted(path for path in map(Path, glob.glob(str(pattern), recursive=True)) if path.is_file())
    if not paths:
        raise UserError(
            f"{key} '{pattern}': no such file or folder (looked in {Path.cwd()}); allowed: "
            f"'{PYTHON_STDLIB}', a file, a folder, a glob, '{DATASET_PREFIX}ORG/NAME[:CONFIG[:SPLIT]]', "
            "or a list of these"
        )
    return paths


def _walk(root: Path, belongs: Callable[[Path], bool]) -> list[Path]:
    """The files below ``root`` that belong, by the code points of their paths (no locale has a say)."""
    return sorted((p for p in root.rglob("*") if belongs(p) and p.is_file()), key=lambda p: p.as_posix())


def _fixed_part(pattern: Path) -> Path:
    """The leading folders of a glob without a wildcard; names inside the source are relative to them."""
    fixed = Path(pattern.anchor)
    for part in pattern.relative_to(pattern.anchor).parts[:-1]:
        if glob.has_magic(part):
            break
        fixed /= part
    return fixed
