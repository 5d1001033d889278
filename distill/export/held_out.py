"""Text to measure an exported model on: a file the user names, or what the student's run held out."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from distill.checks import read_tokenizer
from distill.data import Blocks, evaluation_batches, prepare, read_documents
from distill.data.blocks import MANIFEST
from distill.errors import UserError
from distill.export.account import Account

TOKENS, BLOCK, ROWS = 64_000, 1024, 8


@dataclass(frozen=True)
class MeasuredText:
    """Batches of ``input_ids``, ``position_ids`` and ``labels`` (B, T), and what to call their text."""

    name: str
    batches: list[Mapping[str, Tensor]]


def measured_text(student: Path, account: Account, file: Path | None) -> MeasuredText:
    """The text of ``file``, else the run's held-out text.

    Args:
        student: the folder of a stage, for the run around it; its tokenizer reads ``file``.
        account: of the student; blocks are as long as in training where that is known.
        file: a text file, or anything else that a recipe's ``data.source`` may be.

    Raises:
        UserError: neither is there, or the file cannot be read.
    """
    recipe = account.recipe or {}
    wanted = recipe.get("evaluation", {})
    tokens, rows = wanted.get("tokens", TOKENS), wanted.get("batch_size", ROWS)
    longest = account.config.get_text_config().max_position_embeddings
    block = min(recipe.get("data", {}).get("block", BLOCK), longest)
    if file is not None:
        return MeasuredText(file.name, _read(file, student, block, rows, tokens))
    prepared = student.resolve().parent / "data"
    if not account.stages or not (prepared / MANIFEST).is_file():
        raise UserError(
            f"--quantise measures what it costs, and the run's held-out text does not lie beside {student};"
            " give --eval-text FILE"
        )
    held_out = Blocks(prepared, "held_out", block)
    return MeasuredText("the run's held-out text", list(evaluation_batches(held_out, rows, tokens)))


def _read(file: Path, student: Path, block: int, rows: int, tokens: int) -> list[Mapping[str, Tensor]]:
    if not file.exists():
        raise UserError(f"--eval-text {file}: there is no such file")
    tokenizer = read_tokenizer(student)
    documents = list(read_documents([str(file)], text_key="text", separator=None))
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "text"
        prepare(documents, documents, tokenizer, prepared, block=2, bos=tokenizer.bos_token_id is not None)
        return list(evaluation_batches(Blocks(prepared, "held_out", block), rows, tokens))
