"""Text from a finished model, student or teacher: several prompts at once, or one as it is written."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextStreamer,
)

import distill.student  # noqa: F401  (makes students known to AutoModelForCausalLM)
from distill.decoder import learns_positions
from distill.errors import UserError
from distill.layout import ATTENTION
from distill.weight_files import stored_tensors


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer from a Hugging Face folder, in the dtype it was saved in, on a GPU if there is one.

    Raises:
        UserError: the folder is missing, incomplete or damaged.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give one that holds a model, such as a finished stage")
    if not (folder / "config.json").is_file():
        below = sorted(config.parent.name for config in folder.glob("*/config.json"))
        hint = f"; did you mean one of {', '.join(below)} in it?" if below else ""
        raise UserError(f"{folder} has no config.json, so it is not a model folder{hint}")
    stored_tensors(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    except Exception as error:  # json, tokenizers and transformers each raise their own
        raise UserError(f"{folder} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    bos: bool = False,
    stream: bool = False,
) -> list[str]:
    """Continues each prompt and returns it with its continuation.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer; it need not have a padding token.
        prompts: continued together, padded on the left.
        max_new_tokens: tokens to add, fewer where the model ends the text itself.
        temperature: 0 takes the likeliest token each time.
        top_p: sample from the likeliest tokens that together have this probability.
        seed: of the samples.
        bos: begin with the tokenizer's BOS even where the tokenizer itself would not.
        stream: print the text to stdout as it appears; only for a single prompt.

    Raises:
        UserError: a setting outside its range, a prompt without tokens, or one too long for the model.
    """
    _check_settings(max_new_tokens, temperature, top_p)
    rows = [_encode(tokenizer, prompt, bos) for prompt in prompts]
    width = max(map(len, rows))
    _check_length(model, width, max_new_tokens)
    # Any id will do for padding: the mask keeps it out.
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    ids_BT = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=model.device)
    mask_BT = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
    # A checkpoint's own generation settings may ask for sampling; only where a text ends is taken from them.
    ends = model.generation_config.eos_token_id
    settings = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=pad, **sampling)
    causal_lm: Any = model  # transformers types PreTrainedModel without generate
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        out_BT = causal_lm.generate(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            generation_config=settings,
            streamer=TextStreamer(tokenizer, skip_special_tokens=True) if stream and len(rows) == 1 else None,
        )
    stops = {ends} if isinstance(ends, int) else set(ends or ())
    texts = (row + _until(ids[width:], stops) for row, ids in zip(rows, out_BT.tolist(), strict=True))
    return [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in texts]


def _check_settings(max_new_tokens: int, temperature: float, top_p: float) -> None:
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature is {temperature}; it must be 0 (always the likeliest token) or more")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}; it must be above 0 and at most 1")


def _check_length(model: PreTrainedModel, prompt: int, new: int) -> None:
    layout = getattr(model.config, "distill", None)
    if layout and ATTENTION not in layout["layers"] and not learns_positions(model):
        return  # mixers alone count no positions
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and prompt + new > longest:
        raise UserError(
            f"{prompt} tokens of prompt and {new} new ones are more than the {longest} positions that the model knows;"
            " lower max_new_tokens or shorten the prompt"
        )


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str, bos: bool) -> list[int]:
    ids = list(tokenizer(prompt)["input_ids"])
    if bos and tokenizer.bos_token_id is not None and ids[:1] != [tokenizer.bos_token_id]:
        ids.insert(0, tokenizer.bos_token_id)
    if not ids:
        raise UserError(f"the prompt {prompt!r} has no token to continue from; give it some text")
    return ids


def _until(ids: list[int], stops: set[int]) -> list[int]:
    """The ids before the first stop; after it a row of a batch is only padding."""
    return ids[: next((place for place, token in enumerate(ids) if token in stops), len(ids))]
