"""Text from a finished model, student or teacher: several prompts at once, or one as it is written."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from distill.auto_classes import auto_class
from distill.data.image_encoding import prompt_inputs
from distill.decoding import Sampling, decode, ends_of
from distill.errors import UserError
from distill.prompts import encoded, left_padded, until
from distill.student import reads_any_length  # which also makes students known to transformers' Auto classes
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
        model = auto_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder, dtype="auto")
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
    rows = [encoded(tokenizer, prompt, bos) for prompt in prompts]
    _check_length(model, max(map(len, rows)), max_new_tokens)
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    streamer = TextStreamer(tokenizer, skip_special_tokens=True) if stream and len(rows) == 1 else None
    sampling = Sampling(temperature, top_p, seed)
    inputs = left_padded(rows, pad, model.device)
    new_BT = decode(model, inputs, max_new_tokens, pad=pad, sampling=sampling, streamer=streamer)
    ends = ends_of(model)
    texts = (row + until(new, ends) for row, new in zip(rows, new_BT.tolist(), strict=True))
    return [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in texts]


def answer(
    model: PreTrainedModel,
    processor: Any,
    prompt: str,
    images: Sequence[Path],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stream: bool = False,
) -> str:
    """What a vision-language model says to a prompt about images; the other arguments are those of `generate`.

    Raises:
        UserError: as `generate`; or an image cannot be read, or the model reads none.
    """
    _check_settings(max_new_tokens, temperature, top_p)
    inputs = {name: tensor.to(model.device) for name, tensor in prompt_inputs(processor, prompt, images).items()}
    _check_length(model, inputs["input_ids"].shape[1], max_new_tokens)
    tokenizer = processor.tokenizer
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    sampling = Sampling(temperature, top_p, seed)
    (new_T,) = decode(model, inputs, max_new_tokens, pad=tokenizer.pad_token_id, sampling=sampling, streamer=streamer)
    return str(tokenizer.decode(new_T, skip_special_tokens=True))


def _check_settings(max_new_tokens: int, temperature: float, top_p: float) -> None:
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature is {temperature}; it must be 0 (always the likeliest token) or more")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}; it must be above 0 and at most 1")


def _check_length(model: PreTrainedModel, prompt: int, new: int) -> None:
    if reads_any_length(model):
        return
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and prompt + new > longest:
        raise UserError(
            f"{prompt} tokens of prompt and {new} new ones are more than the {longest} positions that the model knows;"
            " lower max_new_tokens or shorten the prompt"
        )
