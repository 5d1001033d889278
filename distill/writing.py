"""Text that a teacher writes: documents drawn token by token, for its student to train on.

    row        BOS alone, or the first tokens of a training document
    ids        row, then tokens drawn from the teacher's predictions, up to an end of text, any other special token,
               or ``length``
    document   the ids decoded, up to the first character that their bytes do not make

Batch b of rows is drawn with a seed of its own, which the seed and b decide. So a batch depends on none before it, and
a process that is killed loses the batch it was at: finished ones lie as files beside the text that is being written.

Source: MambaInLlama (Wang et al., 2024), whose students train on what their teacher wrote.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple, dataclass
from itertools import count, islice
from operator import add
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.atomic import explained_full_disk, replace_file, sha256_of
from distill.data.progress import progress
from distill.data.source import Source
from distill.data.splits import TRAIN, Extent
from distill.decoding import Sampling, decode, ends_of
from distill.errors import UserError
from distill.lock import alone_in
from distill.prompts import left_padded, until

UNMADE = "\ufffd"
"""What decoding puts where bytes make no character."""


@dataclass(frozen=True)
class Writing:
    """How documents are drawn.

    Attributes:
        length: tokens of a document at most, BOS and prompt among them.
        prompt_tokens: the first tokens of a training document that each begins with, BOS not among them; 0 for none.
        temperature: of the distribution drawn from.
        top_p: draw from the likeliest tokens that together have this probability.
        seed: of the draws.
        batch_size: documents drawn at once. Another number gives other documents.
    """

    length: int
    prompt_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    batch_size: int = 64

    def __post_init__(self) -> None:
        for name, given, fits, allowed in (
            ("prompt_tokens", self.prompt_tokens, self.prompt_tokens >= 0, "0 (none) or more"),
            ("length", self.length, self.length >= self.prompt_tokens + 2, "more than BOS and the prompt"),
            ("temperature", self.temperature, 0 < self.temperature < float("inf"), "above 0"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("seed", self.seed, self.seed >= 0, "0 or more"),
            ("batch_size", self.batch_size, self.batch_size >= 1, "1 or more"),
        ):
            if not fits:
                raise UserError(f"{name} is {given}; it must be {allowed}")


@dataclass(frozen=True)
class Written:
    """What was written, all of it or a batch.

    Attributes:
        documents: with some text.
        tokens: of their text, encoded as a preparation does it; BOS and EOS do not count.
        drawn_as_encoded: documents that encode to the very ids that were drawn.
        ended: documents that the teacher ended; the others were cut at ``length``.
    """

    documents: int = 0
    tokens: int = 0
    drawn_as_encoded: int = 0
    ended: int = 0

    def __add__(self, other: "Written") -> "Written":
        return Written(*map(add, astuple(self), astuple(other)))


def beginnings_of_training_documents(
    source: Source, tokenizer: PreTrainedTokenizerBase, number: int, tokens: int, bos: bool
) -> list[list[int]]:
    """The first ``tokens`` ids of the first training documents that have more, ``number`` at most; BOS before each.

    No document that is held out is looked at.

    Raises:
        UserError: no training document is long enough, or the source cannot be read.
    """
    before = [tokenizer.bos_token_id] if bos else []

    def rows() -> Iterator[list[int]]:
        for document, split, _ in source.read(None, Extent()):
            if split == TRAIN:
                ids = _encoded(tokenizer, document.text)
                if len(ids) > tokens:
                    yield before + ids[:tokens]

    found = list(islice(rows(), number))
    if not found:
        raise UserError(f"no training document has more than {tokens} tokens; begin with fewer")
    return found


def write_documents(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Sequence[int]],
    writing: Writing,
    out: Path,
    *,
    tokens: int,
    key: str = "text",
    identity: str = "",
) -> Written:
    """Write JSONL to ``out``, a document a line, in whole batches until they hold ``tokens``; beside it an account.

    The same call goes on where it was killed, and does nothing where the text is there already.

    Args:
        rows: the ids that documents begin with, all of one length, in turn.
        out: ends in .jsonl; the account gets the same name and .json.
        tokens: that are enough.
        key: of the text in a line.
        identity: what else the documents depend on: the teacher's weights, where the rows come from.

    Raises:
        UserError: ``out`` holds something else, was begun with other settings, is being written by another process,
            or is longer than the teacher's positions; the teacher writes nothing; or the disk is full.
    """
    if out.suffix != ".jsonl":
        raise UserError(f"{out} must end in .jsonl, which is what is written")
    check_length(teacher, writing.length)
    told = json.dumps([asdict(writing), tokens, key, identity, [list(row) for row in rows]])
    settings = hashlib.sha256(told.encode()).hexdigest()
    account, batches = out.with_suffix(".json"), out.with_name(f".{out.name}.batches")
    if out.exists():
        written = _written_before(out, account, settings)
        shutil.rmtree(batches, ignore_errors=True)
        return written
    with alone_in(batches), explained_full_disk(out):
        _require_same(batches / "settings", settings)
        whole = Written()
        with progress(f"writing {out}", "tokens", _tokens_in(batches), tokens) as show:
            for number in count():
                file = batches / f"{number:06}.json"
                if not file.exists():
                    texts, written = _draw(teacher, tokenizer, rows, writing, number)
                    replace_file(file, json.dumps({"texts": texts, "written": asdict(written)}).encode())
                whole += _account_of(file)
                show(whole.tokens)
                if whole.tokens >= tokens:
                    break
        files = [batches / f"{n:06}.json" for n in range(number + 1)]
        lines = (json.dumps({key: text}) + "\n" for file in files for text in json.loads(file.read_text())["texts"])
        text = "".join(lines).encode()
        facts = {"settings": settings, "sha256": hashlib.sha256(text).hexdigest(), **asdict(whole), **asdict(writing)}
        # The account first: a text without one would be somebody else's.
        replace_file(account, json.dumps(facts, indent=2).encode())
        replace_file(out, text)
        shutil.rmtree(batches)
    return whole


def _draw(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Sequence[int]],
    writing: Writing,
    number: int,
) -> tuple[list[str], Written]:
    """Batch ``number``: its documents, and what they are."""
    first = number * writing.batch_size
    batch = [list(rows[place % len(rows)]) for place in range(first, first + writing.batch_size)]
    seed = int(np.random.SeedSequence([writing.seed, number]).generate_state(1)[0])
    ends = {*ends_of(teacher), *special_ids(tokenizer)}
    new_BT = decode(
        teacher,
        left_padded(batch, device=teacher.device),
        writing.length - len(batch[0]),
        sampling=Sampling(writing.temperature, writing.top_p, seed),
        ends=sorted(ends),
    )
    texts, whole = [], Written()
    for row, new in zip(batch, new_BT.tolist(), strict=True):
        drawn = until(new, ends)
        ids = [token for token in row if token not in ends] + drawn
        text = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)).partition(UNMADE)[0]
        if text.strip():
            encoded = _encoded(tokenizer, text)
            texts.append(text)
            whole += Written(1, len(encoded), int(encoded == ids), int(len(drawn) < len(new)))
    if not texts:
        raise UserError("the teacher ends its documents before it writes anything; begin them with --prompt-tokens")
    return texts, whole


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The ids that are no text: beginnings, ends, the marks of chats."""
    return {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | set(tokenizer.all_special_ids)


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def check_length(teacher: PreTrainedModel, length: int) -> None:
    """Raises UserError where a row is longer than the teacher has positions."""
    longest = getattr(teacher.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and length > longest:
        raise UserError(f"length is {length}; the teacher knows {longest} positions, so at most that")


def _written_before(out: Path, account: Path, settings: str) -> Written:
    """The account of a text that is there already, if it is the one that is asked for."""
    facts = json.loads(account.read_text()) if account.is_file() else {}
    if facts.get("settings") != settings or facts["sha256"] != sha256_of(out):
        raise UserError(f"{out} is there already, written with other settings or by something else; give another name")
    return Written(*(facts[name] for name in asdict(Written())))


def _require_same(path: Path, settings: str) -> None:
    if not path.exists():
        replace_file(path, settings.encode())
    if path.read_text() != settings:
        raise UserError(
            f"{path.parent} was begun with other settings or another teacher; put them back, give another name, or"
            " remove it"
        )


def _account_of(file: Path) -> Written:
    return Written(**json.loads(file.read_text())["written"])


def _tokens_in(batches: Path) -> int:
    return sum(_account_of(file).tokens for file in batches.glob("[0-9]*.json"))
