"""Prompts cut out of a text, each with what stands behind it."""

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from distill.continuing import Cut
from distill.data import read_documents
from distill.errors import UserError

SPARE = 4  # times as many stretches as are asked for are looked at, so that they do not all stand at the beginning


def cuts(
    source: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    prompt: int,
    after: int,
    number: int,
    seed: int,
    *,
    text_key: str = "text",
    separator: str | None = None,
) -> list[Cut]:
    """``number`` stretches that do not overlap, drawn by ``seed``: ``prompt`` ids, behind a BOS where there is one, and
    ``after`` ids.

    Raises:
        UserError: the text has less than two of them.
    """
    bos = () if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,)
    found: list[Cut] = []
    for document in read_documents(source, text_key=text_key, separator=separator):
        ids = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
        for start in range(0, len(ids) - prompt - after + 1, prompt + after):
            behind = start + prompt
            found.append(Cut((*bos, *ids[start:behind]), tuple(ids[behind : behind + after])))
        if len(found) >= SPARE * number:
            break
    if len(found) < 2:
        raise UserError(
            f"the text has {len(found)} stretches of {prompt} + {after} tokens in one document, and at least 2 are"
            " needed: give more text, or smaller numbers of tokens"
        )
    chosen = np.random.default_rng(seed).permutation(len(found))[:number]
    return [found[i] for i in sorted(chosen)]
