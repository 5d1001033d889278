"""What a recipe of preference tuning may say, and its pairs, every one of them looked at before a weight is loaded.

    {"prompt": [{"role": "user", "content": "…"}], "chosen": [{"role": "assistant", "content": "…"}], "rejected": […]}
    {"prompt": "…", "chosen": "…", "rejected": "…"}

Answers are compared whole: the loss sums their log-probabilities, and a cut answer is not the one that was preferred.
So a pair that does not fit into ``max_length`` is left out, and counted.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field, model_validator

from distill.errors import UserError
from distill.finetuning.rows import Row, chat_of, is_text, not_encoded, read_all, require_keys, require_one_form
from distill.finetuning.settings import TuningRecipe
from distill.recipe_fields import Integer, Positive, Section, Sources, Text
from distill.recipe_file import read_recipe_file

START = "start"
ANSWERS = ("chosen", "rejected")
COLUMNS = ("prompt", *ANSWERS)


class Pairs(Section):
    """What is learnt from."""

    source: Sources
    """.jsonl or .parquet files, saved datasets or dataset:org/name, with the columns prompt, chosen and rejected."""
    chat_template: Text | None = None
    """A Jinja template, or a file of one, that replaces the tokenizer's chat template and is saved with it."""
    max_length: Annotated[Integer, Field(ge=2)] = 1024
    """Tokens of a prompt with its longer answer; pairs that are longer are left out."""


class PreferRecipe(TuningRecipe):
    """A direct preference optimisation of one model."""

    STAGE: ClassVar[str] = "prefer"
    LEARNING_RATES: ClassVar[tuple[float, float]] = (5e-7, 5e-6)

    data: Pairs
    """What is learnt from."""
    reference: Text
    """What the model is held to: start, which is itself as it is before this tuning; or another model's folder."""
    beta: Positive = 0.01
    """β, how firmly: the larger, the nearer to the reference (MambaInLlama: 0.01)."""
    loss: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    """sigmoid is DPO's own; the others as TRL has them."""

    @model_validator(mode="after")
    def _no_dropout(self) -> "PreferRecipe":
        if self.adapter is not None and self.adapter.dropout:
            raise ValueError(
                "adapter.dropout must be 0 here: the model is compared with its reference, and would differ by chance"
            )
        return self

    @model_validator(mode="after")
    def _start_can_be_kept(self) -> "PreferRecipe":
        goes_on = self.adapter is not None and self.adapter.start is not None
        if self.method == "qlora" and goes_on and self.reference == START:
            raise ValueError(
                "reference: start is a model in 4 bits with adapter.start on it, of which no copy is made; use method:"
                " lora, or begin with a new adapter"
            )
        return self


def load_prefer_recipe(path: Path, overrides: Sequence[str] = ()) -> PreferRecipe:
    """Reads and checks a recipe of preference tuning.

    Raises:
        UserError: as ``distill.recipe.load_recipe``.
    """
    return read_recipe_file(PreferRecipe, Path(path), overrides, in_order={})


def read_pairs(data: Pairs) -> list[tuple[str, Row]]:
    """All pairs with their places; all of text, or all of messages.

    Raises:
        UserError: a source cannot be read or holds nothing; a row is no pair, or one that teaches nothing. It names the
            row.
    """
    pairs = read_all(data.source, _pair, "pair")
    require_one_form(pairs, "pairs")
    return pairs


class Encoded(NamedTuple):
    """The ids of a pair: what prompt and both answers begin with, and the rest of each answer, its end included."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def longest(self) -> int:
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


def encoded_pair(tokenizer: Any, pair: Row) -> Encoded:
    """As TRL's DPOTrainer encodes it: the prompt ends where it and both conversations are no longer the same."""
    if is_text(pair):
        ended = [_ended(pair["prompt"] + pair[name], tokenizer.eos_token) for name in ANSWERS]
        prompt, *both = (list(tokenizer(text)["input_ids"]) for text in (pair["prompt"], *ended))
    else:
        prompt = _rendered(tokenizer, pair["prompt"], add_generation_prompt=True)
        both = [_rendered(tokenizer, pair["prompt"] + pair[name]) for name in ANSWERS]
    shared = min(_n_shared(prompt, whole) for whole in both)
    return Encoded(prompt[:shared], *(whole[shared:] for whole in both))


def fitting_pairs(pairs: list[tuple[str, Row]], tokenizer: Any, max_length: int) -> tuple[list[Row], int]:
    """The pairs of at most ``max_length`` tokens, and how many others there are.

    Raises:
        UserError: a pair cannot be encoded, or its answers are the same tokens; or none is left.
    """
    fitting = []
    for where, pair in pairs:
        try:
            encoded = encoded_pair(tokenizer, pair)
        except Exception as error:  # Jinja's, the template's own, the tokenizer's
            raise not_encoded(pair, where, "pair", error) from None
        if encoded.chosen == encoded.rejected:
            remedy = "" if is_text(pair) else ", or mend the chat template if it leaves the answers out"
            raise UserError(
                f"{where}: chosen and rejected are the same {len(encoded.chosen)} tokens, so that nothing is"
                f" preferred; leave the row out{remedy}"
            )
        if encoded.longest <= max_length:
            fitting.append(pair)
    if not fitting:
        raise UserError(f"data.max_length: all {len(pairs)} pairs are longer than {max_length} tokens; raise it")
    return fitting, len(pairs) - len(fitting)


def _pair(row: Any, where: str) -> Row:
    require_keys(row, COLUMNS, where, "a pair has prompt, chosen and rejected")
    pair = {name: _text_or_chat(row[name], f"{where}: {name}") for name in COLUMNS}
    if len({type(value) for value in pair.values()}) == 2:
        kinds = ", ".join(f"{name} is {'text' if isinstance(pair[name], str) else 'messages'}" for name in COLUMNS)
        raise UserError(f"{where}: {kinds}; give all three in one form")
    for name in ANSWERS:
        _require_answer(pair[name], f"{where}: {name}")
    if not isinstance(pair["prompt"], str) and pair["prompt"][-1]["role"] == "assistant":
        raise UserError(f"{where}: the prompt ends with the assistant, who is to answer it; end it before")
    if pair["chosen"] == pair["rejected"]:
        raise UserError(f"{where}: chosen and rejected are equal, so that nothing is preferred; leave the row out")
    return pair


def _text_or_chat(value: Any, where: str) -> str | list[Row]:
    if isinstance(value, str):
        if not value.strip():
            raise UserError(f"{where} is empty; leave the row out")
        return value
    if not isinstance(value, list) or not value:
        raise UserError(f"{where} is no text and no list of messages")
    return chat_of(value, where)


def _require_answer(answer: str | list[Row], where: str) -> None:
    if isinstance(answer, str):
        return
    if answer[0]["role"] != "assistant" or answer[-1]["role"] != "assistant":
        raise UserError(f"{where} is what the assistant answers: its first and last message are the assistant's")
    if not any(message["content"].strip() for message in answer):
        raise UserError(f"{where} is empty; leave the row out")


def _n_shared(prompt: list[int], whole: list[int]) -> int:
    same = (ours == theirs for ours, theirs in zip(prompt, whole, strict=False))
    return sum(1 for _ in itertools.takewhile(bool, same))


def _ended(text: str, eos: str) -> str:
    return text if text.endswith(eos) else text + eos


def _rendered(tokenizer: Any, messages: list[Row], add_generation_prompt: bool = False) -> list[int]:
    rendered = tokenizer.apply_chat_template(
        messages, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=True
    )
    return list(rendered["input_ids"])
