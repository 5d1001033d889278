"""Tokenise documents once, into the memory-mapped token files of a prepared folder (see ``blocks``)."""

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from distill.data.blocks import FORMAT, MANIFEST, Blocks, Manifest, Split, read_manifest
from distill.data.corpus import Document
from distill.errors import UserError

__all__ = ["MANIFEST", "Blocks", "prepare", "tokenizer_hash"]

# Characters tokenised at a time: enough to keep the tokenizer's threads busy, little enough to forget.
CHUNK_CHARACTERS = 4_000_000


def prepare(
    train: Sequence[Document],
    held_out: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    block: int,
    bos: bool = True,
    eos: bool = False,
) -> Manifest:
    """Tokenise both splits into ``folder``, or keep what is there when it was made from the same things.

    The folder appears whole or not at all, whenever the process is killed. What is there already is used
    again if its fingerprint matches and its files are intact, and is replaced otherwise.

    Args:
        train: Documents to train on.
        held_out: Documents to evaluate on.
        tokenizer: Called without special tokens; ``bos`` and ``eos`` add its own to each document.
        folder: Where to write; it must be new, empty, or prepared data.
        block: Tokens a sequence; only checked here, each split must fill at least one.
        bos: Put the tokenizer's BOS before each document.
        eos: Put the tokenizer's EOS after each document.

    Raises:
        UserError: The tokenizer lacks a token that is asked for, a split is shorter than one block, the
            folder holds something else, or the disk is full.
    """
    folder = Path(folder)
    before = _special(tokenizer, "bos") if bos else []
    after = _special(tokenizer, "eos") if eos else []
    splits = {"train": train, "held_out": held_out}
    fingerprint = _fingerprint(splits, tokenizer, before, after)

    manifest = _intact(folder, fingerprint)
    if manifest is not None:
        _check_lengths(manifest, block)
        return manifest
    _refuse_foreign(folder)
    _sweep(folder)
    temporary = folder.with_name(f"{_temporary_stem(folder)}{os.getpid()}.tmp")
    made = [above for above in folder.parents if not above.exists()]
    dtype = np.dtype("<u2" if _largest_id(tokenizer) <= np.iinfo(np.uint16).max else "<u4")
    try:
        temporary.mkdir(parents=True)
        written = {
            name: _write_split(temporary, name, documents, tokenizer, before, after, dtype)
            for name, documents in splits.items()
        }
        manifest = Manifest(fingerprint, dtype.str, bos, eos, written)
        _check_lengths(manifest, block)
        _write_synced(temporary / MANIFEST, json.dumps(asdict(manifest), indent=2).encode())
        _move_into_place(temporary, folder)
    except OSError as error:
        raise UserError(
            f"{folder}: the prepared data cannot be written ({error.strerror}); "
            "free some space, or choose another folder"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for above in made:  # the innermost first; after a failure they are empty
            with suppress(OSError):
                above.rmdir()
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


def _special(tokenizer: PreTrainedTokenizerBase, which: str) -> list[int]:
    token_id = getattr(tokenizer, f"{which}_token_id")
    if token_id is None:
        raise UserError(
            f"data.{which} is true, but the tokenizer has no {which.upper()} token; set data.{which}: false"
        )
    return [token_id]


def _largest_id(tokenizer: PreTrainedTokenizerBase) -> int:
    # Not the vocabulary's size: ids may have gaps.
    return max(tokenizer.get_vocab().values())


def _fingerprint(
    splits: dict[str, Sequence[Document]],
    tokenizer: PreTrainedTokenizerBase,
    before: list[int],
    after: list[int],
) -> str:
    total = hashlib.sha256(json.dumps([FORMAT, tokenizer_hash(tokenizer), before, after]).encode())
    for name, documents in splits.items():
        total.update(f"\n{name} {len(documents)}\n".encode())
        for document in documents:
            text = _utf8(document)
            total.update(json.dumps([document.name, len(text)]).encode())
            total.update(hashlib.sha256(text).digest())
    return total.hexdigest()


def _write_split(
    folder: Path,
    name: str,
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    before: list[int],
    after: list[int],
    dtype: np.dtype,
) -> Split:
    starts: list[int] = []
    n_tokens = 0
    with (folder / f"{name}.tokens").open("wb") as file:
        for chunk in _chunks(documents):
            encoded = tokenizer(
                [document.text for document in chunk],
                add_special_tokens=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )
            for ids in encoded["input_ids"]:
                starts.append(n_tokens)
                n_tokens += file.write(np.array([*before, *ids, *after], dtype).tobytes()) // dtype.itemsize
        file.flush()
        os.fsync(file.fileno())
    _write_synced(folder / f"{name}.starts", np.array(starts, "<i8").tobytes())
    return Split(
        documents=len(documents),
        characters=sum(len(document.text) for document in documents),
        utf8_bytes=sum(len(_utf8(document)) for document in documents),
        tokens=n_tokens,
        sha256={file: _sha256(folder / file) for file in (f"{name}.tokens", f"{name}.starts")},
    )


def _utf8(document: Document) -> bytes:
    # JSON may hold lone surrogates, which no encoding takes.
    return document.text.encode(errors="replace")


def _chunks(documents: Sequence[Document]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    characters = 0
    for document in documents:
        chunk.append(document)
        characters += len(document.text)
        if characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _check_lengths(manifest: Manifest, block: int) -> None:
    for name, split in manifest.splits.items():
        if split.tokens < block:
            raise UserError(
                f"the {name.replace('_', '-')} text has {split.tokens} tokens, less than one block of {block};"
                " give more text, lower data.block, or change data.held_out"
            )


def _intact(folder: Path, fingerprint: str) -> Manifest | None:
    """The manifest of a folder that can be used as it is, else None."""
    try:
        manifest = read_manifest(folder)
        if manifest.fingerprint != fingerprint:
            return None
        wanted = {file: sha for split in manifest.splits.values() for file, sha in split.sha256.items()}
        return manifest if all(_sha256(folder / file) == sha for file, sha in wanted.items()) else None
    except (UserError, OSError):
        return None


def _refuse_foreign(folder: Path) -> None:
    """Prepared data may be replaced; anything else at its place is somebody's."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; prepared data needs a folder of its own")
    if folder.exists() and any(folder.iterdir()) and not (folder / MANIFEST).exists():
        raise UserError(f"{folder}: holds something other than prepared data; give a new or empty folder")


def _temporary_stem(folder: Path) -> str:
    return f".{folder.name}.{socket.gethostname()}-"


def _sweep(folder: Path) -> None:
    """Remove what killed processes of this machine left beside ``folder``."""
    stem = _temporary_stem(folder)
    for leftover in folder.parent.glob(".*"):
        pid = leftover.name.removeprefix(stem).partition(".")[0]
        if pid.isdigit() and (int(pid) == os.getpid() or not _is_running(int(pid))):
            shutil.rmtree(leftover, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _move_into_place(temporary: Path, folder: Path) -> None:
    """Rename the finished folder to its name; an older one steps aside first, then goes."""
    old = temporary.with_suffix(".old")
    if folder.exists():
        os.replace(folder, old)
    os.replace(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
