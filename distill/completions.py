"""What a model writes when it goes on from a prompt by itself, greedily: the samples of the report."""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.errors import UserError
from distill.evaluating import evaluating
from distill.evaluation import device_of


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
    encoded = [_encode_prompt(tokenizer, prompt, bos) for prompt in prompts]
    groups = [encoded] if tokenizer.pad_token_id is not None and encoded else [[ids] for ids in encoded]
    with evaluating(model):
        generated = [ids for group in groups for ids in _generate(model, tokenizer, group, new_tokens, sharded)]
    return [_continuation(tokenizer, *ids) for ids in zip(encoded, generated, strict=True)]


def _encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, bos: bool) -> list[int]:
    ids = list(tokenizer(prompt)["input_ids"])
    if bos and tokenizer.bos_token_id is not None and ids[:1] != [tokenizer.bos_token_id]:
        ids.insert(0, tokenizer.bos_token_id)
    if not ids:
        raise UserError(f"the prompt {prompt!r} has no token to continue from: give it some text")
    return ids


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    group: Sequence[list[int]],
    new_tokens: int,
    sharded: bool,
) -> list[list[int]]:
    """New ids for each prompt of ids, ended before the first end-of-text token."""
    eos = model.generation_config.eos_token_id if model.generation_config else None
    ends = [eos] if isinstance(eos, int) else eos or []
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends), None)
    width = max(map(len, group))
    ids_BT = torch.tensor([[pad or 0] * (width - len(ids)) + ids for ids in group], device=device_of(model))
    mask_BT = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in group], device=ids_BT.device)
    # A checkpoint's generation config may ask for sampling or penalties: this is the model, plain.
    unset = dict.fromkeys(("temperature", "top_p", "top_k", "repetition_penalty"))
    out_BT = cast(Callable[..., Tensor], model.generate)(
        input_ids=ids_BT,
        attention_mask=mask_BT,
        max_new_tokens=new_tokens,
        pad_token_id=pad,
        do_sample=False,
        num_beams=1,
        synced_gpus=sharded,
        **unset,
    )
    return [_until(row[width:], ends) for row in out_BT.tolist()]


def _until(ids: list[int], ends: Sequence[int]) -> list[int]:
    cut = next((index for index, token in enumerate(ids) if token in ends), len(ids))
    return ids[:cut]


def _continuation(tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int], new_ids: list[int]) -> str:
    """What the new ids add to the text; decoded with the prompt, or many tokenizers drop the space."""

    def text(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    before, whole = text(prompt_ids), text(prompt_ids + new_ids)
    return whole[len(before) :] if whole.startswith(before) else text(new_ids)
