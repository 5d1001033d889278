"""Texts to token ids, in this process or in a worker.

Run as a program this file is the worker: it is given a pickled ``Tokenising`` on stdin, then lists of texts, each of
which it answers on stdout, until stdin ends. So it ends when the process that started it does, however that ended. It
imports nothing of this package, whose imports would cost every worker seconds and hundreds of megabytes.
"""

import hashlib
import os
import pickle
import signal
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

Tokenising = tuple[Any, list[int], list[int], str]
"""A Hugging Face tokenizer, the ids put before and after each text, and the dtype of the ids."""

Encoded = tuple[bytes, int, bytes]
"""A text's ids in that dtype, the bytes of the text in UTF-8, and their SHA-256."""


def encode(tokenising: Tokenising, texts: Sequence[str]) -> list[Encoded]:
    """Each text on its own: how they are put into calls makes no difference."""
    tokenizer, before, after, dtype = tokenising
    # JSON may hold lone surrogates, which neither UTF-8 nor a tokenizer takes.
    utf8 = [text.encode(errors="replace") for text in texts]
    encoded = tokenizer(
        [text.decode() for text in utf8],
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return [
        (np.array([*before, *ids, *after], dtype).tobytes(), len(text), hashlib.sha256(text).digest())
        for text, ids in zip(utf8, encoded["input_ids"], strict=True)
    ]


def _work() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the parent decides
    requests, results = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not come between the results
    try:
        tokenising = pickle.loads(pickle.load(requests))
        while True:
            pickle.dump(encode(tokenising, pickle.load(requests)), results)
            results.flush()
    except (EOFError, BrokenPipeError):
        os._exit(0)


if __name__ == "__main__":
    _work()
