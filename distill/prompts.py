"""Prompts as ids: encoded, made into one batch, and what a model wrote after them cut at the end of its text."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from distill.errors import UserError


def encoded(tokenizer: PreTrainedTokenizerBase, prompt: str, bos: bool) -> list[int]:
    """The ids of a prompt; with ``bos`` they begin with the tokenizer's BOS even where it would not, and never twice.

    Raises:
        UserError: the prompt has no token at all.
    """
    ids = list(tokenizer(prompt)["input_ids"])
    if bos and tokenizer.bos_token_id is not None and ids[:1] != [tokenizer.bos_token_id]:
        ids.insert(0, tokenizer.bos_token_id)
    if not ids:
        raise UserError(f"the prompt {prompt!r} has no token to continue from; give it some text")
    return ids


def left_padded(
    rows: Sequence[Sequence[int]], pad: int = 0, device: torch.device | str | None = None
) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` of rows that end together; (B, T) int64.

    Args:
        pad: any id will do, since the mask keeps it out.
    """
    width = max(map(len, rows))
    ids = [[pad] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


def until(ids: list[int], ends: Collection[int]) -> list[int]:
    """The ids before the first end of text; after it a row of a batch is only padding."""
    return ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))]
