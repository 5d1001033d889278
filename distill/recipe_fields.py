"""The kinds of value a recipe holds, and what all its sections are.

Nothing is silently turned into another kind: true is not 1, "3" is not 3.
"""

import re
from decimal import Decimal
from typing import Annotated

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    Strict,
    TypeAdapter,
    ValidationError,
)

from distill.errors import UserError


class Section(BaseModel):
    """A part of a recipe: immutable, and without room for unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def _token_count(value: object) -> object:
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMB])", value)
    tokens = Decimal(match[1]) * {"K": 10**3, "M": 10**6, "B": 10**9}[match[2]] if match else None
    if tokens is None or tokens != int(tokens):
        raise ValueError("must be a whole number of tokens such as 5000, 100K, 1.5M or 2B")
    return int(tokens)


def _number_of_key(value: object) -> object:
    """A key that is a number, which JSON writes as text."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def as_list(value: object) -> object:
    """One text as a list of it."""
    return [value] if isinstance(value, str) else value


def _one_as_text(values: tuple[str, ...]) -> str | list[str]:
    return values[0] if len(values) == 1 else list(values)


def _distinct(values: tuple) -> tuple:
    if len(set(values)) < len(values):
        raise ValueError("must not name anything twice")
    return values


def _some(values: tuple) -> tuple:
    # Not Field(min_length=1): pydantic would also count items that are wrong as absent.
    if not values:
        raise ValueError("must name at least one")
    return _distinct(values)


Flag = Annotated[bool, Strict()]
Text = Annotated[str, Strict(), Field(min_length=1)]
Integer = Annotated[int, Strict()]
Count = Annotated[Integer, Field(ge=1)]
Layer = Annotated[Integer, BeforeValidator(_number_of_key), Field(ge=0)]
Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Positive = Annotated[Number, Field(gt=0)]
NotNegative = Annotated[Number, Field(ge=0)]
Fraction = Annotated[Number, Field(ge=0, le=1)]
Beta = Annotated[Number, Field(ge=0, lt=1)]
Tokens = Annotated[Count, BeforeValidator(_token_count)]
Distinct = AfterValidator(_distinct)
Some = AfterValidator(_some)
Sources = Annotated[tuple[Text, ...], BeforeValidator(as_list), Some, PlainSerializer(_one_as_text)]
MoreSources = Annotated[tuple[Text, ...], BeforeValidator(as_list), Distinct]


def read_tokens(option: str, given: str) -> int:
    """Tokens on a command line, written as in a recipe.

    Raises:
        UserError: they are not.
    """
    try:
        return TypeAdapter(Tokens).validate_python(int(given) if given.isdecimal() else given)
    except ValidationError:
        raise UserError(f"{option} {given}: give tokens such as 500000, 500K or 4M") from None
