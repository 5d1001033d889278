"""Tokenise documents once, into the memory-mapped token files of a prepared folder (see ``blocks``).

Documents are read one after another, tokenised by the chunk, and added to the files part by part (see ``parts``). What
is in memory is a few chunks and one part. Neither chunks nor parts nor workers leave a trace in the result.
"""

import hashlib
import json
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from distill.atomic import explained_full_disk, settle, sha256_of
from distill.data.blocks import FORMAT, MANIFEST, Blocks, Manifest, read_manifest
from distill.data.parts import MadeFrom, Parts, discard_parts, open_parts
from distill.data.progress import progress, say
from distill.data.readers import Document
from distill.data.source import DocumentsAtHand, Item, Source
from distill.data.splits import HELD_OUT, TRAIN, require_both_sides
from distill.data.tokenising import Encoded, Tokenising
from distill.data.workers import Encode, encoder
from distill.errors import UserError

__all__ = ["MANIFEST", "Blocks", "prepare", "prepare_source", "tokenizer_hash"]

# Characters tokenised at a time: enough to make the way to a worker and back worth it.
CHUNK_CHARACTERS = 1_000_000
# Characters of a part, the most that is done again after a kill: seconds to a minute or two.
PART_CHARACTERS = 64_000_000


def prepare(
    train: Sequence[Document],
    held_out: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    block: int,
    bos: bool = True,
    eos: bool = False,
    workers: int = 1,
) -> Manifest:
    """Prepare two lists of documents: ``prepare_source`` for text that is in memory anyway."""
    source = DocumentsAtHand(train, held_out)
    return prepare_source(source, tokenizer, folder, block=block, bos=bos, eos=eos, workers=workers)


def prepare_source(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    block: int,
    bos: bool = True,
    eos: bool = False,
    limit: int | None = None,
    workers: int = 1,
) -> Manifest:
    """Tokenise a source into ``folder``, or keep what is there when it was made from the same things.

    The folder appears whole or not at all, whenever the process is killed, and the same call goes on from the last
    whole part. What is there already is used again if it was made from the same source and settings and its files are
    intact, and is replaced otherwise. One process prepares a folder at a time.

    Args:
        source: The documents.
        tokenizer: Called without special tokens; ``bos`` and ``eos`` add its own to each document.
        folder: Where to write; it must be new, empty, or prepared data.
        block: Tokens a sequence; only checked here, each split must fill at least one.
        bos: Put the tokenizer's BOS before each document.
        eos: Put the tokenizer's EOS after each document.
        limit: Training tokens that are enough: the document that reaches them is the last, but for what is trained
            on only. None for all there are.
        workers: Processes that tokenise, which never changes the result; 1 is this one.

    Raises:
        UserError: The source cannot be read, the tokenizer lacks a token that is asked for, a split is shorter than
            one block, the folder holds something else or is being prepared by another process, or the disk is full.
    """
    folder = Path(folder)
    tokenising = _tokenising(tokenizer, bos, eos)
    settings = [FORMAT, tokenizer_hash(tokenizer), *tokenising[1:], limit]
    request = _digest([settings, source.request()])

    settle(folder)
    manifest = _intact(folder, request)
    if manifest is not None:
        discard_parts(folder)
        _require_block({name: split.tokens for name, split in manifest.splits.items()}, block)
        return manifest
    _refuse_foreign(folder)
    options, shards = source.made_from()
    made_from = MadeFrom(_digest([settings, options]), shards)
    with _explained(folder), open_parts(folder, made_from, np.dtype(tokenising[3]).itemsize) as parts:
        with encoder(tokenising, workers) as encode:
            _read_on(parts, source, encode, limit, folder)
        train, held_out = parts.splits[TRAIN], parts.splits[HELD_OUT]
        require_both_sides(train.documents, held_out.documents, source.split())
        _require_block({name: split.n_tokens for name, split in parts.splits.items()}, block)
        parts.seal()
        chains = {name: split.chain for name, split in parts.splits.items()}
        manifest = Manifest(
            fingerprint=_digest([settings[:-1], chains]),
            request=request,
            dtype=tokenising[3],
            bos=bos,
            eos=eos,
            splits={name: split.facts() for name, split in parts.splits.items()},
        )
        parts.finish(manifest, folder)
    return manifest


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of what a tokenizer does to text, whatever its folder is called."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        state: Any = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
    else:
        state = json.loads(backend.to_str())
        # Both are left behind by earlier calls of the tokenizer, and do not touch a call without them.
        state["truncation"] = state["padding"] = None
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _read_on(parts: Parts, source: Source, encode: Encode, limit: int | None, folder: Path) -> None:
    """Add to the parts what the source holds behind them, until its end or the limit, then its training-only text."""
    train = parts.splits[TRAIN]
    if parts.count:
        say(f"preparing {folder}: going on from {train.n_tokens:,} training tokens in {parts.count} part(s)")
    if limit is None or train.n_tokens < limit:
        _add(parts, source.read(parts.position, parts.extent), encode, limit, folder)
    _add(parts, source.read_training_only(parts.position), encode, None, folder)


def _add(parts: Parts, items: Iterable[Item], encode: Encode, limit: int | None, folder: Path) -> None:
    """Add items, to the last one or to the one that reaches the limit."""
    train = parts.splits[TRAIN]
    encoded = _encoded(items, encode)
    with closing(encoded), progress(f"preparing {folder}", "training tokens", train.n_tokens, limit) as show:
        for item, tokens in encoded:
            parts.add(item.split, item.document, tokens, item.position)
            if parts.pending >= PART_CHARACTERS:
                parts.seal()
            show(train.n_tokens)
            if limit is not None and train.n_tokens >= limit:
                return


def _encoded(items: Iterable[Item], encode: Encode) -> Generator[tuple[Item, Encoded], None, None]:
    """Each item with its tokens."""
    under_way: deque[list[Item]] = deque()

    def texts() -> Iterator[list[str]]:
        for chunk in _chunks(items):
            under_way.append(chunk)
            yield [item.document.text for item in chunk]

    for encoded in encode(texts()):
        yield from zip(under_way.popleft(), encoded, strict=True)


def _chunks(items: Iterable[Item]) -> Iterator[list[Item]]:
    chunk: list[Item] = []
    characters = 0
    for item in items:
        chunk.append(item)
        characters += len(item.document.text)
        if characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _tokenising(tokenizer: PreTrainedTokenizerBase, bos: bool, eos: bool) -> Tokenising:
    before = _special(tokenizer, "bos") if bos else []
    after = _special(tokenizer, "eos") if eos else []
    # Not the vocabulary's size: ids may have gaps.
    largest = max(tokenizer.get_vocab().values())
    return tokenizer, before, after, "<u2" if largest <= np.iinfo(np.uint16).max else "<u4"


def _special(tokenizer: PreTrainedTokenizerBase, which: str) -> list[int]:
    token_id = getattr(tokenizer, f"{which}_token_id")
    if token_id is None:
        raise UserError(
            f"data.{which} is true, but the tokenizer has no {which.upper()} token; set data.{which}: false"
        )
    return [token_id]


def _digest(told: Any) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _require_block(tokens: dict[str, int], block: int) -> None:
    for name, n_tokens in tokens.items():
        if n_tokens < block:
            raise UserError(
                f"the {name.replace('_', '-')} text has {n_tokens} tokens, less than one block of {block};"
                " give more text, lower data.block, or change data.held_out"
            )


def _intact(folder: Path, request: str) -> Manifest | None:
    """The manifest of a folder that can be used as it is, else None."""
    try:
        manifest = read_manifest(folder)
        if manifest.request != request:
            return None
        wanted = {file: sha for split in manifest.splits.values() for file, sha in split.sha256.items()}
        return manifest if all(sha256_of(folder / file) == sha for file, sha in wanted.items()) else None
    except (UserError, OSError):
        return None


def _refuse_foreign(folder: Path) -> None:
    """Prepared data may be replaced; anything else at its place is somebody's."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; prepared data needs a folder of its own")
    if folder.exists() and any(folder.iterdir()) and not (folder / MANIFEST).exists():
        raise UserError(f"{folder}: holds something other than prepared data; give a new or empty folder")


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        with explained_full_disk(folder):
            yield
    except OSError as error:
        raise UserError(
            f"{folder}: the prepared data cannot be written ({error.strerror}); make room for it, or choose another"
            " folder"
        ) from error
