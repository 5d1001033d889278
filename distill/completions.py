"""What a model writes when it goes on from a prompt by itself, greedily: the samples of the report."""

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.decoding import decode, ends_of
from distill.evaluating import evaluating
from distill.evaluation import device_of
from distill.prompts import encoded, left_padded, until


def completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    new_tokens: int,
    *,
    bos: bool = False,
    sharded: bool = False,
) -> list[str]:
    """The greedy continuation of each prompt, without the prompt, up to ``new_tokens`` or an end of text.

    Prompts of different lengths are padded on the left into one batch where the tokenizer has a padding
    token, else they run one by one.

    Args:
        bos: begin every prompt with the tokenizer's BOS, as ``data.bos`` does for documents, even where the
            tokenizer would not; never twice.
        sharded: several processes call this, each with its part of the weights, so that none may stop before the last.
            Given the same prompts they would stop together, if it were not for GPUs of different makes, which may take
            another token where two are as likely.

    Raises:
        UserError: a prompt has no token at all.
    """
    rows = [encoded(tokenizer, prompt, bos) for prompt in prompts]
    groups = [rows] if tokenizer.pad_token_id is not None and rows else [[ids] for ids in rows]
    with evaluating(model):
        generated = [ids for group in groups for ids in _generate(model, tokenizer, group, new_tokens, sharded)]
    return [_continuation(tokenizer, *ids) for ids in zip(rows, generated, strict=True)]


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    group: Sequence[list[int]],
    new_tokens: int,
    sharded: bool,
) -> list[list[int]]:
    """New ids for each prompt of ids, ended before the first end-of-text token."""
    ends = ends_of(model)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends), 0)
    inputs = left_padded(group, pad, device_of(model))
    return [until(new, ends) for new in decode(model, inputs, new_tokens, pad=pad, sharded=sharded).tolist()]


def _continuation(tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int], new_ids: list[int]) -> str:
    """What the new ids add to the text; decoded with the prompt, or many tokenizers drop the space."""

    def text(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    before, whole = text(prompt_ids), text(prompt_ids + new_ids)
    return whole[len(before) :] if whole.startswith(before) else text(new_ids)
