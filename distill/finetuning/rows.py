"""The rows a model is tuned on, every one of them looked at before a weight is loaded. They are held in memory.

chat   {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
text   {"text": "…"}
"""

import glob
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from distill.data.corpus import DATASET_PREFIX, read_documents
from distill.data.dataset_rows import is_saved_dataset, open_hub_dataset, open_saved_dataset
from distill.data.readers import require_whole
from distill.errors import UserError
from distill.finetuning.recipe import TuningData

ROLES = ("system", "user", "assistant", "tool")
_NEEDED = "every message needs a role and content, such as {role: user, content: Hello}"

Row = dict[str, Any]
T = TypeVar("T")


def read_rows(data: TuningData) -> list[Row]:
    """All rows, under the key ``messages`` or ``text``.

    Raises:
        UserError: a source cannot be read or holds nothing; a row is no chat. It names the row.
    """
    if data.format == "text":
        documents = read_documents(list(data.source), text_key=data.key, separator=data.separator)
        return [{"text": document.text} for document in documents]
    return [{"messages": chat} for _, chat in read_all(data.source, lambda row, at: _chat(row, data, at), "chat")]


def read_all(sources: Sequence[str], read: Callable[[Any, str], T], what: str) -> list[tuple[str, T]]:
    """What ``read`` makes of every row and its place, each with that place.

    Args:
        what: a row holds, for messages.

    Raises:
        UserError: a source cannot be read or holds nothing; or what ``read`` raises.
    """
    made: list[tuple[str, T]] = []
    for source in sources:
        found = [(where, read(row, where)) for where, row in rows_of(source)]
        if not found:
            raise UserError(f"data.source {source!r}: has no rows; give a dataset with at least one {what}")
        made += found
    return made


def _chat(row: Any, data: TuningData, where: str) -> list[Row]:
    """The messages of a row, each with a role and text."""
    require_keys(row, [data.key], where, "set data.key to the one with the messages")
    messages = row[data.key]
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: {data.key!r} holds no list of messages; for documents set data.format to text")
    chat = chat_of(messages, where)
    if data.assistant_only and all(message["role"] != "assistant" for message in chat):
        raise UserError(
            f"{where}: no message is the assistant's, so that nothing of it would be learnt; leave the row out, or set"
            " data.assistant_only to false"
        )
    return chat


def require_keys(row: Any, keys: Sequence[str], where: str, remedy: str) -> None:
    """Refuse a row that is no mapping, or lacks one of ``keys``.

    Raises:
        UserError: names the row, what it lacks and what it has.
    """
    has = row if isinstance(row, dict) else {}
    if lacking := [repr(key) for key in keys if key not in has]:
        raise UserError(f"{where}: no key {', '.join(lacking)}; the keys are {', '.join(has) or '(none)'}; {remedy}")


def is_text(row: Row) -> bool:
    """Whether the ``prompt`` of a row is plain text, of which the tokenizer makes tokens without a chat template."""
    return isinstance(row["prompt"], str)


def require_one_form(rows: Sequence[tuple[str, Row]], what: str) -> None:
    """Refuse rows with their places of which some are text and some messages.

    Args:
        what: they are, for messages.

    Raises:
        UserError: names the first of either form.
    """
    first = {is_text(row): where for where, row in reversed(rows)}
    if len(first) == 2:
        raise UserError(f"{first[True]} is plain text and {first[False]} messages; give all {what} in one of the two")


def not_encoded(row: Row, where: str, what: str, error: Exception) -> UserError:
    """What to raise where no tokens could be made of a row: it blames what the row went through."""
    blamed = "the tokenizer does not encode" if is_text(row) else "the chat template does not render"
    return UserError(f"{where}: {blamed} this {what}: {error}")


def chat_of(messages: list[Any], where: str) -> list[Row]:
    """Messages with a role and text each, and nothing else.

    Raises:
        UserError: names the message.
    """
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            has = f"has {', '.join(message)}" if isinstance(message, dict) else f"is a {type(message).__name__}"
            raise UserError(f"{where}: message {number} {has}; {_NEEDED}")
        if message["role"] not in ROLES:
            raise UserError(f"{where}: message {number} has the role {message['role']!r}; roles are {', '.join(ROLES)}")
        if not isinstance(message["content"], str):
            raise UserError(f"{where}: the content of message {number} is no text; {_NEEDED}")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def rows_of(source: str) -> Iterator[tuple[str, Any]]:
    """Every row with its place, for messages."""
    if source.startswith(DATASET_PREFIX):
        yield from _numbered(source, open_hub_dataset(source.removeprefix(DATASET_PREFIX)))
        return
    folder = Path(source).expanduser()
    if folder.is_dir() and is_saved_dataset(folder):
        yield from _numbered(source, open_saved_dataset(folder))
        return
    paths = sorted(map(Path, glob.glob(str(folder))))
    if not paths:
        raise UserError(f"data.source {source!r}: no such file; give .jsonl or .parquet, or dataset:org/name")
    for path in paths:
        if path.suffix == ".jsonl":
            yield from _lines(path)
        elif path.suffix == ".parquet":
            yield from _numbered(str(path), _parquet(path))
        else:
            raise UserError(f"data.source {str(path)!r}: chats are read from .jsonl and .parquet files")


def _numbered(name: str, rows: Any) -> Iterator[tuple[str, Any]]:
    return ((f"{name}, row {number}", row) for number, row in enumerate(rows))


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error}); give a .jsonl file") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}:{number}: is not JSON ({error}); give one JSON object a line") from None


def _parquet(path: Path) -> list[Row]:
    import pyarrow.parquet

    require_whole(path)
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as Parquet ({error}); is the file whole?") from None
