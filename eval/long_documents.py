"""Documents that are long enough, in a tokenizer's ids."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from distill.data import Document, read_documents
from distill.errors import UserError


def long_documents(
    source: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    most: int,
    *,
    text_key: str = "text",
    separator: str | None = None,
) -> dict[str, list[int]]:
    """The first ``tokens`` ids of up to ``most`` documents that have as many, by name; a BOS first, where there is one.

    Raises:
        UserError: no document is so long.
    """
    found: dict[str, list[int]] = {}
    longest: Document | None = None
    for document in read_documents(source, text_key=text_key, separator=separator):
        size = len(document.text.encode())
        if longest is None or size > len(longest.text.encode()):
            longest = document
        if size < tokens - 1:  # no token is shorter than a byte
            continue
        ids = _ids(tokenizer, document.text)
        if len(ids) >= tokens:
            found[document.name] = ids[:tokens]
        if len(found) == most:
            break
    if not found:
        assert longest is not None, "a source without text is refused by read_documents"
        has = len(_ids(tokenizer, longest.text))
        raise UserError(
            f"no document of the text has {tokens:,} tokens; the longest, {longest.name}, has {has:,}: give"
            " longer ones, or a smaller --up-to or --trained"
        )
    return found


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    bos = tokenizer.bos_token_id
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]
