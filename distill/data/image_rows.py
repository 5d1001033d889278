"""Read image-text rows: conversations, prompts with answers, or texts, each with the images it speaks of.

A row of a ``.jsonl`` or ``.parquet`` file is one of::

    {"messages": [{"role": "user", "content": "<image>What is this?"}, {"role": "assistant", "content": "A cat."}],
     "images": ["cat.png"]}
    {"prompt": "<image>caption en", "answer": "a cat", "images": ["cat.png"]}
    {"text": "<image>A cat on a mat.", "images": ["cat.png"]}

``<image>`` says where an image stands; a row without the mark has its images first. ``content`` may also be the list of
parts that Hugging Face's chat templates read. Images are files, relative to the folder of the row's file or absolute.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from distill.errors import UserError

MARK = "<image>"
Kind = Literal["messages", "prompt", "text"]
KINDS: tuple[Kind, ...] = ("messages", "prompt", "text")


@dataclass(frozen=True)
class ImageRow:
    """One row, checked.

    Attributes:
        where: file and line, for messages.
        kind: which of the three forms it has.
        content: the messages, with their content as lists of parts; the prompt; or the text.
        answer: of a prompt.
        images: the files, in the order in which the marks stand.
    """

    where: str
    kind: Kind
    content: Any
    answer: str
    images: tuple[Path, ...]


def find_row_files(sources: Sequence[str]) -> list[Path]:
    """The ``.jsonl`` and ``.parquet`` files that the sources name, in the order they are read.

    Raises:
        UserError: a source is not there, or is neither such a file nor a folder or glob with such files.
    """
    found: list[Path] = []
    for source in sources:
        path = Path(source).expanduser()
        if path.is_dir():
            here = sorted(file for file in path.rglob("*") if file.suffix in (".jsonl", ".parquet"))
        elif path.is_file():
            here = [path]
        else:
            here = sorted(path.parent.glob(path.name)) if path.parent.is_dir() else []
        if not here or any(file.suffix not in (".jsonl", ".parquet") for file in here):
            raise UserError(
                f"data.source {source!r} is no .jsonl or .parquet file, nor a folder or glob of these (looked in"
                f" {Path.cwd()}); image-text rows are read from such files"
            )
        found += here
    return found


def read_image_rows(files: Sequence[Path]) -> Iterator[ImageRow]:
    """Every row, one after another.

    Raises:
        UserError: naming file and line: a row has another form, or an image is missing or has no place.
    """
    for file in files:
        rows = _json_lines(file) if file.suffix == ".jsonl" else _parquet_rows(file)
        for where, row in rows:
            yield _checked(row, where, file.parent)


def _json_lines(file: Path) -> Iterator[tuple[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield f"{file}:{number}", json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(f"{file}:{number}: is not JSON ({error.msg}, column {error.colno})") from error


def _parquet_rows(file: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    place = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as opened:
            for batch in opened.iter_batches(256):
                for row in batch.to_pylist():
                    yield f"{file}, row {place}", row
                    place += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file}: cannot be read as Parquet ({error}); is the file whole?") from error


def _checked(row: Any, where: str, folder: Path) -> ImageRow:
    kind = next((kind for kind in KINDS if isinstance(row, dict) and row.get(kind)), None)
    if kind is None:
        keys = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise UserError(f"{where}: needs one of messages, prompt (with answer) or text; it has {keys or 'nothing'}")
    images = tuple(_image(given, where, folder) for given in row.get("images") or ())
    answer = ""
    if kind == "prompt":
        answer = row.get("answer")
        if not isinstance(answer, str) or not answer:
            raise UserError(f"{where}: a prompt needs an answer (a text); it has {answer!r}")
    content = _messages(row[kind], where) if kind == "messages" else _text(row[kind], kind, where)
    content, marks = _with_marks(content, len(images))
    if marks != len(images):
        raise UserError(f"{where}: {marks} {MARK} marks or image parts and {len(images)} images; give one for each")
    return ImageRow(where, kind, content, answer, images)


def _image(given: Any, where: str, folder: Path) -> Path:
    if not isinstance(given, str):
        raise UserError(f"{where}: images must be a list of file names; it holds a {type(given).__name__}")
    path = (folder / Path(given).expanduser()).absolute()
    if not path.is_file():
        raise UserError(f"{where}: no image {path}")
    return path


def _text(value: Any, kind: str, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: {kind} must be a text, not a {type(value).__name__}")
    return value


def _messages(messages: Any, where: str) -> list[dict[str, Any]]:
    """With every content as a list of parts."""
    read = []
    for message in messages if isinstance(messages, list) else [messages]:
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise UserError(f"{where}: a message needs role and content; given: {message!r:.80}")
        content = message["content"]
        parts = parts_of(content) if isinstance(content, str) else [_part(part, where) for part in content]
        read.append({"role": message["role"], "content": parts})
    return read


def parts_of(text: str) -> list[dict[str, str]]:
    """A text with marks as parts: images where the marks stand."""
    parts: list[dict[str, str]] = []
    for index, piece in enumerate(text.split(MARK)):
        parts += [{"type": "image"}] if index else []
        parts += [{"type": "text", "text": piece}] if piece else []
    return parts


def _part(part: Any, where: str) -> dict[str, str]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "image":
        return {"type": "image"}
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    raise UserError(f"{where}: a part of a message is text or image; given: {part!r:.80}")


def _with_marks(content: Any, n_images: int) -> tuple[Any, int]:
    """The content and how many images have a place in it; without any mark they all stand first."""
    if isinstance(content, str):
        marks = content.count(MARK)
        return (content, marks) if marks else (MARK * n_images + content, n_images)
    marks = sum(part["type"] == "image" for message in content for part in message["content"])
    asking = next((message for message in content if message["role"] == "user"), None)
    if not marks and n_images and asking is not None:
        asking["content"] = [{"type": "image"}] * n_images + asking["content"]
        marks = n_images
    return content, marks
