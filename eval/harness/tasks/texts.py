"""A text of one's own as a rolling-likelihood task, so that models with different tokenizers can be compared.

    lm_eval ... --tasks text_perplexity --include_path eval/harness/tasks --metadata '{"text": "corpus/*.txt"}'

Each document is scored by itself from a beginning-of-text token on, and counts by its words and bytes, whatever the
tokens are. Without a ``text`` it is the standard library of the running Python.
"""

from itertools import islice
from typing import Any

from datasets import Dataset

from distill.data import read_documents
from distill.data.corpus import PYTHON_STDLIB


def documents(
    text: str | list[str] = PYTHON_STDLIB,
    documents: int = 16,
    characters: int = 4000,
    text_key: str = "text",
    separator: str | None = None,
    **_others: Any,
) -> dict[str, Dataset]:
    """A split ``test`` of the first ``documents`` of a text; the others in the metadata are the harness's own.

    Args:
        text, text_key, separator: as a recipe's ``data`` has them.
        characters: of each document, from its beginning; 0 is all.
    """
    found = islice(read_documents(text, text_key=text_key, separator=separator), documents)
    return {"test": Dataset.from_list([{"text": one.text[: characters or None]} for one in found])}
