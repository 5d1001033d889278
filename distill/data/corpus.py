"""Read text from wherever it lies as named documents, and split them into training and held-out text."""

import glob
import hashlib
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path

from distill.data.readers import (
    ROW_SUFFIXES,
    Document,
    is_saved_dataset,
    read_file,
    read_hub_dataset,
    read_saved_dataset,
)
from distill.errors import UserError

__all__ = ["DATASET_PREFIX", "PYTHON_STDLIB", "Document", "read_documents", "split_documents"]

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
    source: str | Path | Sequence[str | Path], *, text_key: str = "text", separator: str | None = None
) -> Iterator[Document]:
    """Read every document of a source, in an order that depends on the source alone.

    Args:
        source: ``"python-stdlib"`` (the standard library of the running Python); a text, ``.jsonl`` or
            ``.parquet`` file; a folder of such files, or one saved by ``datasets``; a glob;
            ``"dataset:ORG/NAME[:CONFIG[:SPLIT]]"``, which ``datasets`` loads; or a list of these.
        text_key: The key of the text in rows (``.jsonl``, ``.parquet``, datasets).
        separator: Cuts text files into documents, such as ``"\\n\\n"``; ``None`` makes a file one document.

    Yields:
        Documents that hold more than white space.

    Raises:
        UserError: The source does not exist, or holds no text, or something in it is not text.
    """
    if separator == "":
        raise UserError("data.separator is empty; give the text between two documents, or null for none")
    entries = [source] if isinstance(source, str | Path) else list(source)
    if not entries:
        raise UserError("data.source is an empty list; give at least one file, folder or glob")
    for entry in entries:
        found = False
        for document in _read_entry(str(entry), text_key, separator):
            found = True
            yield document
        if not found:
            raise UserError(f"data.source {str(entry)!r} holds no text at all; give a source with text in it")


def split_documents(
    documents: Iterable[Document], *, fraction: float, by: str = "hash"
) -> tuple[list[Document], list[Document]]:
    """Split documents into (training, held out).

    ``by="hash"`` holds out the documents whose name hashes below ``fraction``: adding or removing documents
    never moves another one, on any machine or Python. ``by="tail"`` holds out the end of the text: about the
    last ``fraction`` of all characters, cut at the nearest border between two documents.

    Raises:
        UserError: ``fraction`` is not between 0 and 1, ``by`` is unknown, or one side would be empty.
    """
    documents = list(documents)
    if not 0 < fraction < 1:
        raise UserError(f"data.held_out.fraction is {fraction}; allowed: more than 0 and less than 1")
    if by == "hash":
        held = [_unit_hash(document.name) < fraction for document in documents]
    elif by == "tail":
        border = _tail_border([len(document.text) for document in documents], fraction)
        held = [index >= border for index in range(len(documents))]
    else:
        raise UserError(f"data.held_out.by is {by!r}; allowed: 'hash', 'tail'")
    train = [document for document, out in zip(documents, held, strict=True) if not out]
    held_out = [document for document, out in zip(documents, held, strict=True) if out]
    if not train or not held_out:
        raise UserError(
            f"splitting {len(documents)} document(s) by {by} at {fraction} leaves nothing "
            f"{'to train on' if held_out else 'held out'}; give more documents, set data.separator so that "
            "text files are cut into documents, or change data.held_out"
        )
    return train, held_out


def _unit_hash(name: str) -> float:
    """A number in [0, 1) that depends on the name alone (``hash()`` would differ from run to run)."""
    return int.from_bytes(hashlib.sha256(name.encode(errors="replace")).digest()[:6]) / 2**48


def _tail_border(lengths: Sequence[int], fraction: float) -> int:
    """Index of the first held-out document: of the inner borders, the nearest to the wanted character."""
    ends = list(accumulate(lengths))
    if len(ends) < 2:
        return len(ends)
    wanted = (1 - fraction) * ends[-1]
    return 1 + min(range(len(ends) - 1), key=lambda i: abs(ends[i] - wanted))


def _read_entry(source: str, text_key: str, separator: str | None) -> Iterator[Document]:
    """Documents of one entry of ``data.source``."""
    path = Path(source).expanduser()
    if source == PYTHON_STDLIB:
        return _read_stdlib()
    if source.startswith(DATASET_PREFIX):
        return read_hub_dataset(source.removeprefix(DATASET_PREFIX), text_key)
    if path.is_dir():
        if is_saved_dataset(path):
            return read_saved_dataset(path, text_key)
        return _read_folder(path, text_key, separator)
    if path.exists():
        return read_file(path, path.name, text_key, separator)
    return _read_glob(path, text_key, separator)


def _read_stdlib() -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))

    def belongs(path: Path) -> bool:
        return path.suffix == ".py" and STDLIB_LEFT_OUT.isdisjoint(path.relative_to(root).parts)

    for path in _walk(root, belongs):
        yield from read_file(path, path.relative_to(root).as_posix(), may_be_empty=True)


def _read_folder(folder: Path, text_key: str, separator: str | None) -> Iterator[Document]:
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
    for path in paths:
        yield from read_file(path, path.relative_to(folder).as_posix(), text_key, separator, may_be_empty=True)


def _read_glob(pattern: Path, text_key: str, separator: str | None) -> Iterator[Document]:
    root = _fixed_part(pattern)
    paths = sorted(path for path in map(Path, glob.glob(str(pattern), recursive=True)) if path.is_file())
    if not paths:
        raise UserError(
            f"data.source '{pattern}': no such file or folder (looked in {Path.cwd()}); allowed: "
            f"'{PYTHON_STDLIB}', a file, a folder, a glob, '{DATASET_PREFIX}ORG/NAME[:CONFIG[:SPLIT]]', "
            "or a list of these"
        )
    for path in paths:
        yield from read_file(path, path.relative_to(root).as_posix(), text_key, separator, may_be_empty=True)


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
