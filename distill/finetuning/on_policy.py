"""What a recipe of on-policy distillation may say, and its prompts, every one looked at before a weight is loaded.

    {"prompt": "Once upon a time"}
    {"prompt": [{"role": "user", "content": "…"}]}

Chats serve as prompts as well: what the assistant says at their end is what the student is to write itself.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from distill.errors import UserError
from distill.finetuning.rows import Row, chat_of, is_text, not_encoded, read_all, require_keys, require_one_form
from distill.finetuning.settings import TuningRecipe
from distill.recipe_fields import Count, Fraction, Positive, Section, Sources, Text
from distill.recipe_file import read_recipe_file


class Prompts(Section):
    """What the student writes from."""

    source: Sources
    """.jsonl or .parquet files, saved datasets or dataset:org/name."""
    key: Text = "prompt"
    """The column that holds a prompt, text or messages, or a chat, whose last answer is then left out."""
    chat_template: Text | None = None
    """A Jinja template, or a file of one, that replaces the tokenizer's chat template and is saved with it."""
    max_prompt: Count = 512
    """Tokens of a prompt; rows that are longer are left out."""


class Grader(Section):
    """Who grades what the student wrote, token by token."""

    path: Text
    """The teacher's folder; it has the model's tokenizer."""


class OnPolicyRecipe(TuningRecipe):
    """A distillation on what the student itself writes."""

    STAGE: ClassVar[str] = "onpolicy"
    LEARNING_RATES: ClassVar[tuple[float, float]] = (1e-6, 1e-5)

    data: Prompts
    """What the student writes from."""
    teacher: Grader
    """Whose predictions the student is compared with."""
    beta: Fraction = 1.0
    """0 is forward KL, 1 is reverse KL, between them the generalised Jensen-Shannon divergence."""
    new_tokens: Count = 128
    """Tokens that are written at most after a prompt."""
    temperature: Positive = 1.0
    """Of the student's writing, and of both sides of the divergence."""


def load_on_policy_recipe(path: Path, overrides: Sequence[str] = ()) -> OnPolicyRecipe:
    """Reads and checks a recipe of on-policy distillation.

    Raises:
        UserError: as ``distill.recipe.load_recipe``.
    """
    return read_recipe_file(OnPolicyRecipe, Path(path), overrides, in_order={})


def read_prompts(data: Prompts) -> list[tuple[str, Row]]:
    """All prompts, under the key ``prompt``, with their places; all of text, or all of messages.

    Raises:
        UserError: a source cannot be read or holds nothing; a row has no prompt. It names the row.
    """
    prompts = read_all(data.source, lambda row, where: {"prompt": _prompt(row, data.key, where)}, "prompt")
    require_one_form(prompts, "prompts")
    return prompts


def fitting_prompts(prompts: list[tuple[str, Row]], tokenizer: Any, most: int) -> tuple[list[Row], int]:
    """The prompts of at most ``most`` tokens, and how many others there are.

    Raises:
        UserError: a prompt cannot be encoded; or none is left.
    """
    fitting = []
    for where, row in prompts:
        try:
            n_tokens = len(_encoded(tokenizer, row["prompt"]))
        except Exception as error:  # Jinja's, the template's own, the tokenizer's
            raise not_encoded(row, where, "prompt", error) from None
        if not n_tokens:
            remedy = "leave the row out" if is_text(row) else "mend it or the chat template"
            raise UserError(f"{where}: the prompt has no token to go on from; {remedy}")
        if n_tokens <= most:
            fitting.append(row)
    if not fitting:
        raise UserError(f"data.max_prompt: all {len(prompts)} prompts are longer than {most} tokens; raise it")
    return fitting, len(prompts) - len(fitting)


def _prompt(row: Any, key: str, where: str) -> str | list[Row]:
    require_keys(row, [key], where, "set data.key to the one with the prompt")
    value = row[key]
    if isinstance(value, str):
        if not value.strip():
            raise UserError(f"{where}: the prompt is empty; leave the row out")
        return value
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: {key!r} holds no text and no list of messages")
    backwards = itertools.dropwhile(lambda message: message["role"] == "assistant", reversed(chat_of(value, where)))
    prompt = list(backwards)[::-1]
    if not prompt:
        raise UserError(f"{where}: all messages are the assistant's, so that there is nothing to answer")
    return prompt


def _encoded(tokenizer: Any, prompt: str | list[Row]) -> list[int]:
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    rendered = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)
    return list(rendered["input_ids"])
