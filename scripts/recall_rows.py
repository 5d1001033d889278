"""Rows of associative recall and of phone books, as a text to distil the recall teacher on.

    python -m scripts.recall_rows

Ids as words, a row a line, answers in their places. Drawn from a seed, so that everybody has the same; the teacher
itself was trained on rows of other seeds.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import tokenizers
import typer
from transformers import PreTrainedTokenizerFast

from distill.recall.rows import SMALLEST, Row, associative, phonebook

Cell = tuple[str, int, int]  # task, items, length

SHORT: list[Cell] = [("associative", 4, 64), ("associative", 8, 64), ("phonebook", 3, 0), ("phonebook", 6, 0)]
LONG: list[Cell] = [
    *SHORT,
    ("associative", 16, 64),
    ("associative", 16, 128),
    ("associative", 32, 128),
    ("phonebook", 6, 128),
    ("phonebook", 12, 0),
    ("phonebook", 18, 0),
]
SHOTS = 8  # lookups of a phone book; models are examined with two and a last one
LONGEST = 256
VOCABULARY = 512

Vocabulary = Annotated[int, typer.Option(min=SMALLEST, help="Token ids.")]


def main(
    output: Annotated[Path, typer.Option(help="The file.")] = Path("runs/recall-teacher/rows.txt"),
    rows: Annotated[int, typer.Option(min=1, help="How many.")] = 20_000,
    vocabulary: Vocabulary = VOCABULARY,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, other rows.")] = 0,
) -> None:
    """Write rows of the recall teacher's tasks, one a line."""
    write_text(output, rows, vocabulary, seed)
    print(f"{output}: {rows:,} rows")


def write_text(file: Path, number: int, vocabulary: int, seed: int) -> None:
    """Rows of all cells as words, with their answers."""
    rng = np.random.default_rng([seed, number, 1])
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = (" ".join(map(str, row.answered())) for row in drawn(LONG, number, vocabulary, rng))
    file.write_text("\n".join(lines) + "\n")


def drawn(cells: list[Cell], number: int, vocabulary: int, rng: np.random.Generator) -> Iterator[Row]:
    """Rows of any of the cells."""
    for cell in rng.integers(len(cells), size=number).tolist():
        task, items, length = cells[cell]
        if task == "associative":
            yield associative(rng, items, length, vocabulary)
        else:
            yield phonebook(rng, items, length, vocabulary, shots=SHOTS)


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Writes id 17 as the word ``17``."""
    words = {str(number): number for number in range(vocabulary)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="0"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, model_max_length=LONGEST)


if __name__ == "__main__":
    typer.run(main)
