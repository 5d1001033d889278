"""Which tokens of a chat are scored is said by its template: ``{% generation %}`` … ``{% endgeneration %}``."""

import re
from pathlib import Path
from typing import Any

from distill.errors import UserError
from distill.finetuning.recipe import TuningData
from distill.finetuning.rows import Row

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


def set_template(tokenizer: Any, given: str | None) -> None:
    """Give the tokenizer the template that ``given``, data.chat_template, is or names; None leaves its own.

    Raises:
        UserError: the file cannot be read.
    """
    if given is not None and ("{%" in given or "{{" in given):
        tokenizer.chat_template = given
    elif given is not None:
        try:
            tokenizer.chat_template = Path(given).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"data.chat_template {given!r} cannot be read ({error}); give a Jinja file") from None


def require_template(tokenizer: Any) -> str:
    """The one template that the tokenizer has.

    Raises:
        UserError: it has none, or several.
    """
    template = tokenizer.chat_template
    if not isinstance(template, str):
        has = "several chat templates" if template else "no chat template"
        raise UserError(f"the model's tokenizer has {has}; give one as data.chat_template")
    return template


def check_template(tokenizer: Any, data: TuningData, rows: list[Row]) -> None:
    """Render the first chat as training will.

    Raises:
        UserError: there is no template, it marks no assistant tokens where they are asked for, or it does not render.
    """
    template = require_template(tokenizer)
    if data.assistant_only and not _MARKER.search(template):
        raise UserError(
            "the chat template has no assistant marker, so that the assistant's tokens cannot be told from others; put"
            " {% generation %} and {% endgeneration %} around them in a copy of it and name that by"
            " data.chat_template, or set data.assistant_only to false"
        )
    try:
        rendered = tokenizer.apply_chat_template(
            rows[0]["messages"], return_dict=True, return_assistant_tokens_mask=data.assistant_only
        )
    except Exception as error:  # Jinja's, the template's own, the tokenizer's
        raise UserError(f"the chat template does not render the first row: {error}") from None
    if data.assistant_only and 1 not in rendered["assistant_masks"]:
        raise UserError(
            "the chat template marks no token of the first row as the assistant's; put {% generation %} and"
            " {% endgeneration %} around what the assistant says"
        )
